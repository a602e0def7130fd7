// A whole multilayer perceptron as one op and one autograd node:
//
//   h_0 = x     h_i = g(h_{i-1} W_iᵀ + b_i)     y = h_{L-1} W_Lᵀ + b_L
//
// mlp_forward returns y and then the hidden h_1 ... h_{L-1}, which mlp_backward reads. They are tensors of their
// own: the allocator gives very large blocks back to the system, and their pages would be new in every step. They
// are outputs of the autograd node too, though nobody is given them: gradients of gradients reach the arguments
// through them. Layers that the kernels do not cover make the network a chain of linear ops.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "backends.h"
#include "linear.h"
#include "saved.h"

namespace fastmlp {
namespace {

using at::TensorList;
using OptionalTensors = c10::List<OptionalTensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

OptionalTensor bias_of(TensorList biases, size_t layer) {
  return biases.empty() ? std::nullopt : OptionalTensor(biases[layer]);
}

// Raises where the layers do not fit together, naming the one. What is broadcast or of fewer dimensions is left to the
// layer, which computes what torch's own does.
void check_network(const Tensor& input, TensorList weights, TensorList biases) {
  TORCH_CHECK(!weights.empty(), "weights: expected one for each layer, got none");
  TORCH_CHECK(biases.empty() || biases.size() == weights.size(), "biases: expected ", weights.size(),
              ", as many as weights, or none, got ", biases.size());
  check_arguments(input, weights[0], bias_of(biases, 0));
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto name = [i](const char* list) { return std::string(list) + "[" + std::to_string(i) + "]"; };
    const Tensor& weight = weights[i];
    check_same(name("weights"), weight, input);
    if (i > 0 && weight.dim() == 2 && weights[i - 1].dim() == 2)
      TORCH_CHECK(weight.sym_size(1) == weights[i - 1].sym_size(0), name("weights"), ": expected shape [*, ",
                  weights[i - 1].sym_size(0), "] after weights of shape ", weights[i - 1].sym_sizes(),
                  ", got ", weight.sym_sizes());
    if (biases.empty()) continue;
    check_same(name("biases"), biases[i], input);
    if (weight.dim() == 2 && biases[i].dim() == 1)
      TORCH_CHECK(biases[i].sym_size(0) == weight.sym_size(0) || biases[i].sym_size(0) == 1, name("biases"),
                  ": expected shape [", weight.sym_size(0), "] for weights of shape ", weight.sym_sizes(),
                  ", got ", biases[i].sym_sizes());
  }
}

bool is_fused(const Tensor& input, TensorList weights, TensorList biases) {
  for (size_t i = 0; i < weights.size(); ++i)
    if (why_not_fused(input, weights[i], bias_of(biases, i))) return false;
  return true;
}

}  // namespace

// ---- through the dispatcher

Tensor call_mlp(const Tensor& input, TensorList weights, TensorList biases, std::string_view activation) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastmlp::mlp", "").typed<decltype(call_mlp)>();
  return op.call(input, weights, biases, activation);
}

namespace {

std::vector<Tensor> call_mlp_forward(const Tensor& input, TensorList weights, TensorList biases,
                                     std::string_view activation) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastmlp::mlp_forward", "")
                             .typed<decltype(call_mlp_forward)>();
  return op.call(input, weights, biases, activation);
}

std::vector<Tensor> call_mlp_backward(const Tensor& grad_y, const OptionalTensor& input,
                                      const OptionalTensors& weights, const OptionalTensors& hidden,
                                      std::string_view activation, at::IntArrayRef wanted) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastmlp::mlp_backward", "")
                             .typed<decltype(call_mlp_backward)>();
  return op.call(grad_y, input, weights, hidden, activation, wanted);
}

// ---- layer by layer

Tensor mlp_by_layers(const Tensor& input, TensorList weights, TensorList biases,
                     std::string_view activation) {
  check_network(input, weights, biases);
  Tensor h = input;
  for (size_t i = 0; i < weights.size(); ++i)
    h = call_linear(h, weights[i], bias_of(biases, i), i + 1 < weights.size() ? activation : "identity");
  return h;
}

std::vector<Tensor> mlp_forward_composite(const Tensor& input, TensorList weights, TensorList biases,
                                          std::string_view activation) {
  check_network(input, weights, biases);
  std::vector<Tensor> outputs = {input};
  for (size_t i = 0; i < weights.size(); ++i)
    outputs.push_back(linear_composite(outputs.back(), weights[i], bias_of(biases, i),
                                       i + 1 < weights.size() ? activation : "identity"));
  outputs[0] = outputs.back();
  outputs.pop_back();
  return outputs;
}

// ---- what the backward pass reads

// The gradients are numbered as the arguments are: input, the weights, the biases. `wanted` are those asked for.
struct Wanted {
  Wanted(size_t layers, at::IntArrayRef numbers) : L(layers), lowest(layers), is_wanted(1 + 2 * layers) {
    for (const int64_t number : numbers) {
      TORCH_CHECK(0 <= number && size_t(number) < is_wanted.size(),
                  "wanted: expected numbers of arguments, got ", number);
      is_wanted[number] = true;
      lowest = std::min(lowest, number ? size_t(number - 1) % L : 0);
    }
  }
  bool grad_x(size_t i) const { return i > lowest || (i == 0 && is_wanted[0]); }
  bool grad_weight(size_t i) const { return is_wanted[1 + i]; }
  bool grad_bias(size_t i) const { return is_wanted[1 + L + i]; }
  Mask mask(size_t i) const { return {grad_x(i), grad_weight(i), grad_bias(i)}; }

  size_t L, lowest;  // the lowest layer that anything is asked of; L for none
  std::vector<bool> is_wanted;
};

OptionalTensor input_of(size_t layer, const OptionalTensor& input, const OptionalTensors& hidden) {
  return layer == 0 ? input : hidden.get(layer - 1);
}

// Raises where a layer that something is asked of lacks what its gradients are made of.
void check_backward(const Tensor& grad_y, const OptionalTensor& input, const OptionalTensors& weights,
                    const OptionalTensors& hidden, const Wanted& wanted) {
  const size_t L = wanted.L;
  TORCH_CHECK(hidden.size() + 1 == L, "hidden: expected ", L - 1, " for ", L, " layers, got ", hidden.size());
  TORCH_CHECK(grad_y.dim() >= 1, "grad_y: expected shape [..., out_features], got a tensor of no dimension");
  const auto check = [&](const char* name, size_t i, const OptionalTensor& t, bool is_read) {
    TORCH_CHECK(t || !is_read, name, ": expected that of layer ", i, ", got None");
    if (t) check_same(name, *t, grad_y);
  };
  c10::SymInt M = 1;
  for (const auto& size : grad_y.sym_sizes().slice(0, grad_y.dim() - 1)) M = M * size;
  check("input", 0, input, L > 0 && wanted.grad_weight(0));
  for (size_t i = wanted.lowest; i < L; ++i) {
    check("weights", i, weights.get(i), wanted.grad_x(i));
    if (i > 0) check("hidden", i - 1, hidden.get(i - 1), wanted.grad_weight(i) || i > wanted.lowest);
    const c10::SymInt N =
        i + 1 < L ? (hidden.get(i) ? hidden.get(i)->sym_size(-1) : -1) : grad_y.sym_size(-1);
    const OptionalTensor x = input_of(i, input, hidden), weight = weights.get(i);
    TORCH_CHECK(!weight || (weight->dim() == 2 && (N == -1 || weight->sym_size(0) == N) &&
                            (!x || x->sym_size(-1) == weight->sym_size(1))),
                "weights: expected that of layer ", i, " to fit the layers beside it, got shape ",
                weight->sym_sizes());
    TORCH_CHECK(!x || x->sym_numel() == M * x->sym_size(-1), i ? "hidden" : "input", ": expected ", M,
                " rows, as many as grad_y has, got shape ", x->sym_sizes());
  }
}

// From the gradients of all the node's outputs, of which some are undefined, for zero.
std::vector<Tensor> mlp_backward_composite(TensorList grad_outputs, const OptionalTensor& input,
                                           const OptionalTensors& weights, const OptionalTensors& hidden,
                                           std::string_view activation, const Wanted& wanted) {
  const size_t L = wanted.L;
  std::vector<Tensor> grads(1 + 2 * L);
  Tensor grad;
  for (size_t i = L; i-- > wanted.lowest;) {
    const bool last = i + 1 == L;
    const Tensor more = last ? grad_outputs[0] : i + 1 < grad_outputs.size() ? grad_outputs[i + 1] : Tensor();
    if (more.defined()) grad = grad.defined() ? grad + more : more;
    if (!grad.defined()) continue;
    std::tie(grad, grads[1 + i], grads[1 + L + i]) = linear_backward_composite(
        grad, input_of(i, input, hidden), weights.get(i), last ? std::nullopt : OptionalTensor(hidden.get(i)),
        last ? "identity" : activation, wanted.mask(i));
  }
  if (wanted.is_wanted[0]) grads[0] = grad;
  return grads;
}

std::vector<Tensor> only(at::IntArrayRef numbers, const std::vector<Tensor>& grads) {
  std::vector<Tensor> result;
  for (const int64_t number : numbers) result.push_back(grads[number]);
  return result;
}

std::vector<Tensor> mlp_backward_composite(const Tensor& grad_y, const OptionalTensor& input,
                                           const OptionalTensors& weights, const OptionalTensors& hidden,
                                           std::string_view activation, at::IntArrayRef numbers) {
  const Wanted wanted(weights.size(), numbers);
  check_backward(grad_y, input, weights, hidden, wanted);
  return only(numbers,
              mlp_backward_composite(TensorList(grad_y), input, weights, hidden, activation, wanted));
}

// ---- the fused path

at::DimVector result_sizes(const Tensor& input, const Tensor& weight) {
  at::DimVector sizes(input.sizes());
  sizes.back() = weight.size(0);
  return sizes;
}

// y and, where backward will come, the hidden layers.
template <class Device>
std::vector<Tensor> run_forward(const Tensor& input, TensorList weights, TensorList biases,
                                std::string_view activation, bool keep) {
  const Activation g = parse_activation(activation);
  const c10::DeviceGuard guard(input.device());
  const int64_t M = rows_of(input), L = int64_t(weights.size());
  std::vector<Tensor> outputs = {empty(result_sizes(input, weights.back()), input.options())};
  for (int64_t i = 0; keep && i + 1 < L; ++i)
    outputs.push_back(empty(result_sizes(input, weights[i]), input.options()));
  const Tensor x = as_matrix(input, M, input.size(-1));
  std::vector<Tensor> contiguous;  // biases, alive until the kernels have run
  std::vector<Forward> layers;
  for (int64_t i = 0; i < L; ++i) {
    const bool last = i + 1 == L;
    if (!biases.empty()) contiguous.push_back(biases[i].contiguous());
    layers.push_back({.dtype = dtype_of(input),
                      .reduced = is_reduced(input),
                      .activation = last ? Activation{} : g,
                      .M = M,
                      .N = weights[i].size(0),
                      .K = weights[i].size(1),
                      .x = i ? layers.back().y : x.const_data_ptr(),
                      .ldx = i ? weights[i].size(1) : x.stride(0),
                      .weight = weights[i].const_data_ptr(),
                      .ldw = weights[i].stride(0),
                      .bias = biases.empty() ? nullptr : contiguous.back().const_data_ptr(),
                      .y = last   ? outputs[0].mutable_data_ptr()
                           : keep ? outputs[i + 1].mutable_data_ptr()
                                  : nullptr});
  }
  run<Device>(layers.data(), L, input);
  return outputs;
}

template <class Device>
Tensor mlp(const Tensor& input, TensorList weights, TensorList biases, std::string_view activation) {
  check_network(input, weights, biases);
  if (!is_fused(input, weights, biases)) return mlp_by_layers(input, weights, biases, activation);
  return run_forward<Device>(input, weights, biases, activation, false)[0];
}

template <class Device>
std::vector<Tensor> mlp_forward(const Tensor& input, TensorList weights, TensorList biases,
                                std::string_view activation) {
  check_network(input, weights, biases);
  TORCH_CHECK(is_fused(input, weights, biases), "mlp_forward: the kernels do not cover these arguments");
  return run_forward<Device>(input, weights, biases, activation, true);
}

template <class Device>
std::vector<Tensor> mlp_backward(const Tensor& grad_y, const OptionalTensor& input,
                                 const OptionalTensors& weights, const OptionalTensors& hidden,
                                 std::string_view activation, at::IntArrayRef numbers) {
  const Activation g = parse_activation(activation);
  const Wanted wanted(weights.size(), numbers);
  check_backward(grad_y, input, weights, hidden, wanted);
  const size_t L = wanted.L;
  for (size_t i = wanted.lowest; i < L; ++i)
    if (why_not_fused_backward(grad_y, input_of(i, input, hidden), weights.get(i)))
      return only(numbers,
                  mlp_backward_composite(TensorList(grad_y), input, weights, hidden, activation, wanted));

  const c10::DeviceGuard guard(grad_y.device());
  const int64_t M = rows_of(grad_y);
  const Tensor dy = grad_y.contiguous();
  std::vector<Tensor> grads(1 + 2 * L), read;  // what is read, alive until the kernels have run
  std::vector<Backward> layers;
  read.reserve(3 * L);
  const auto data = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
  for (size_t i = L; i-- > wanted.lowest;) {
    const bool last = i + 1 == L;
    const auto [grad_x, grad_weight, grad_bias] = wanted.mask(i);
    const OptionalTensor x = input_of(i, input, hidden), weight = weights.get(i);
    Backward p{};
    p.dtype = dtype_of(grad_y);
    p.reduced = is_reduced(grad_y);
    p.activation = last ? Activation{} : g;
    p.M = M;
    p.N = last ? grad_y.size(-1) : layers.back().K;
    p.K = weight ? weight->size(1) : x ? x->size(-1) : 0;
    p.grad_y = last ? dy.const_data_ptr() : nullptr;
    if (!last) p.saved = read.emplace_back(hidden.get(i)->contiguous()).const_data_ptr();
    if (grad_weight) {
      p.x = read.emplace_back(as_matrix(*x, M, p.K)).const_data_ptr();
      p.ldx = read.back().stride(0);
      grads[1 + i] = empty({p.N, p.K}, grad_y.options());
    }
    if (grad_x) {
      p.weight = read.emplace_back(*weight).const_data_ptr();
      p.ldw = weight->stride(0);
    }
    if (grad_x && i == 0) {
      at::DimVector sizes(grad_y.sizes());
      sizes.back() = p.K;
      grads[0] = empty(sizes, grad_y.options());
      p.grad_x = data(grads[0]);
    }
    if (grad_bias) grads[1 + L + i] = empty({p.N}, grad_y.options());
    p.grad_weight = data(grads[1 + i]);
    p.grad_bias = data(grads[1 + L + i]);
    layers.push_back(p);
  }
  if (!layers.empty()) run<Device>(layers.data(), int64_t(layers.size()), grad_y);
  return only(numbers, grads);
}

// ---- shapes alone, for tracing

c10::SymDimVector sizes_like(const Tensor& t, const c10::SymInt& last) {
  c10::SymDimVector sizes(t.sym_sizes());
  sizes.back() = last;
  return sizes;
}

Tensor mlp_meta(const Tensor& input, TensorList weights, TensorList biases, std::string_view activation) {
  parse_activation(activation);
  check_network(input, weights, biases);
  if (!is_fused(input, weights, biases)) return mlp_by_layers(input, weights, biases, activation);
  return at::empty_symint(sizes_like(input, weights.back().sym_size(0)), input.options());
}

std::vector<Tensor> mlp_forward_meta(const Tensor& input, TensorList weights, TensorList biases,
                                     std::string_view activation) {
  std::vector<Tensor> outputs = {mlp_meta(input, weights, biases, activation)};
  for (size_t i = 0; i + 1 < weights.size(); ++i)
    outputs.push_back(at::empty_symint(sizes_like(input, weights[i].sym_size(0)), input.options()));
  return outputs;
}

std::vector<Tensor> mlp_backward_meta(const Tensor& grad_y, const OptionalTensor& input,
                                      const OptionalTensors& weights, const OptionalTensors& hidden,
                                      std::string_view activation, at::IntArrayRef numbers) {
  parse_activation(activation);
  const Wanted wanted(weights.size(), numbers);
  check_backward(grad_y, input, weights, hidden, wanted);
  std::vector<Tensor> grads;
  for (const int64_t number : numbers) {
    const size_t L = wanted.L, i = number ? size_t(number - 1) % L : 0;
    const c10::SymInt N = i + 1 == L ? grad_y.sym_size(-1) : hidden.get(i)->sym_size(-1);
    const auto sizes = number == 0          ? sizes_like(grad_y, weights.get(0)->sym_size(1))
                       : size_t(number) > L ? c10::SymDimVector{N}
                                            : c10::SymDimVector{N, input_of(i, input, hidden)->sym_size(-1)};
    grads.push_back(at::empty_symint(sizes, grad_y.options()));
  }
  return grads;
}

// ---- autocast and autograd

template <c10::DispatchKey autocast, c10::DeviceType device>
Tensor mlp_autocast(const Tensor& input, TensorList weights, TensorList biases, std::string_view activation) {
  const c10::impl::ExcludeDispatchKeyGuard guard(autocast);
  const auto type = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(type, t, device); };
  return call_mlp(cast(input), cast(weights), cast(biases), activation);
}

struct MlpFunction : torch::autograd::Function<MlpFunction> {
  static constexpr bool is_traceable = true;

  // y and the hidden layers.
  static variable_list forward(AutogradContext* ctx, const Tensor& input, TensorList weights,
                               TensorList biases, std::string_view activation) {
    const size_t L = weights.size();
    SavedLayers layers{std::vector<int64_t>(L), !biases.empty()};
    variable_list saved_weights(L);
    bool has_grad = input.requires_grad();  // what passes from layer to layer
    for (size_t i = 0; i < L; ++i) {
      if (weights[i].requires_grad()) layers.what[i] |= saves_x;
      if (has_grad) layers.what[i] |= saves_weight, saved_weights[i] = layers.oriented(weights[i]);
      has_grad |= weights[i].requires_grad() || (!biases.empty() && biases[i].requires_grad());
      if (has_grad && i + 1 < L) layers.what[i] |= saves_y;
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    variable_list outputs = call_mlp_forward(input, weights, biases, activation);
    variable_list saved;
    layers.each([&](size_t i, Saved what) {
      saved.push_back(what == saves_weight ? saved_weights[i]
                      : what == saves_y    ? outputs[1 + i]
                      : i > 0              ? outputs[i]
                                           : input);
    });
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["layers"] = layers.packed();
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const SavedLayers layers = SavedLayers::unpacked(ctx->saved_data["layers"]);
    const size_t L = layers.what.size(), count = 1 + (layers.has_bias ? 2 : 1) * L;
    OptionalTensor input;
    OptionalTensors weights, hidden;
    weights.resize(L);
    hidden.resize(L - 1);
    size_t next = 0;
    layers.each([&](size_t i, Saved what) {
      const Tensor& t = saved[next++];
      if (what == saves_weight) weights.set(i, layers.restored(t));
      else if (what == saves_y) hidden.set(i, t);
      else if (i > 0) hidden.set(i - 1, t);
      else input = t;
    });
    std::vector<int64_t> numbers;
    for (size_t i = 0; i < count; ++i)
      if (ctx->needs_input_grad(i)) numbers.push_back(int64_t(i));
    const std::string& activation = ctx->saved_data["activation"].toStringRef();
    variable_list grads(count + 1);  // the last is the activation's
    const bool of_y_alone = std::none_of(grad_outputs.begin() + 1, grad_outputs.end(),
                                         [](const Tensor& t) { return t.defined(); });
    if (of_y_alone && !grad_outputs[0].defined()) return grads;
    const auto found = of_y_alone
                           ? call_mlp_backward(grad_outputs[0], input, weights, hidden, activation, numbers)
                           : only(numbers, mlp_backward_composite(grad_outputs, input, weights, hidden,
                                                                  activation, Wanted(L, numbers)));
    for (size_t i = 0; i < numbers.size(); ++i) grads[numbers[i]] = found[i];
    return grads;
  }
};

bool is_differentiated(TensorList tensors) {
  for (const Tensor& t : tensors)
    if (t.requires_grad()) return true;
  return false;
}

Tensor mlp_autograd(const Tensor& input, TensorList weights, TensorList biases, std::string_view activation) {
  check_network(input, weights, biases);
  if (!is_fused(input, weights, biases)) return mlp_by_layers(input, weights, biases, activation);
  if (at::GradMode::is_enabled() &&
      (input.requires_grad() || is_differentiated(weights) || is_differentiated(biases)))
    return MlpFunction::apply(input, weights, biases, activation)[0];
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_mlp(input, weights, biases, activation);
}

bool is_differentiated(const OptionalTensors& tensors) {
  for (const OptionalTensor t : tensors)
    if (t && t->requires_grad()) return true;
  return false;
}

std::vector<Tensor> mlp_backward_autograd(const Tensor& grad_y, const OptionalTensor& input,
                                          const OptionalTensors& weights, const OptionalTensors& hidden,
                                          std::string_view activation, at::IntArrayRef numbers) {
  if (at::GradMode::is_enabled() && (grad_y.requires_grad() || (input && input->requires_grad()) ||
                                     is_differentiated(weights) || is_differentiated(hidden)))
    return mlp_backward_composite(grad_y, input, weights, hidden, activation, numbers);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_mlp_backward(grad_y, input, weights, hidden, activation, numbers);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastmlp, m) {
  m.def("mlp(Tensor input, Tensor[] weights, Tensor[] biases, str activation='relu') -> Tensor");
  m.def("mlp_forward(Tensor input, Tensor[] weights, Tensor[] biases, str activation) -> Tensor[]");
  m.def(
      "mlp_backward(Tensor grad_y, Tensor? input, Tensor?[] weights, Tensor?[] hidden, str activation, "
      "int[] wanted) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(fastmlp, CPU, m) {
  m.impl("mlp", mlp<Cpu>);
  m.impl("mlp_forward", mlp_forward<Cpu>);
  m.impl("mlp_backward", mlp_backward<Cpu>);
}
#ifdef FASTMLP_WITH_CUDA
TORCH_LIBRARY_IMPL(fastmlp, CUDA, m) {
  m.impl("mlp", mlp<Cuda>);
  m.impl("mlp_forward", mlp_forward<Cuda>);
  m.impl("mlp_backward", mlp_backward<Cuda>);
}
#endif
TORCH_LIBRARY_IMPL(fastmlp, Meta, m) {
  m.impl("mlp", mlp_meta);
  m.impl("mlp_forward", mlp_forward_meta);
  m.impl("mlp_backward", mlp_backward_meta);
}
#define FASTMLP_COMPOSITE(key)                                                                 \
  TORCH_LIBRARY_IMPL(fastmlp, key, m) {                                                        \
    m.impl("mlp", mlp_by_layers);                                                              \
    m.impl("mlp_forward", mlp_forward_composite);                                              \
    m.impl("mlp_backward", static_cast<decltype(call_mlp_backward)*>(mlp_backward_composite)); \
  }
FASTMLP_COMPOSITE(CompositeExplicitAutograd)
FASTMLP_COMPOSITE(FuncTorchBatched)
FASTMLP_COMPOSITE(Batched)
TORCH_LIBRARY_IMPL(fastmlp, Tracer, m) { m.impl("mlp", mlp_by_layers); }
TORCH_LIBRARY_IMPL(fastmlp, AutocastCPU, m) {
  m.impl("mlp", mlp_autocast<c10::DispatchKey::AutocastCPU, c10::kCPU>);
}
TORCH_LIBRARY_IMPL(fastmlp, AutocastCUDA, m) {
  m.impl("mlp", mlp_autocast<c10::DispatchKey::AutocastCUDA, c10::kCUDA>);
}
TORCH_LIBRARY_IMPL(fastmlp, Autograd, m) {
  m.impl("mlp", mlp_autograd);
  m.impl("mlp_backward", mlp_backward_autograd);
}

}  // namespace fastmlp
