// A whole multilayer perceptron as one op and one autograd node:
//
//   h_0 = x     h_i = g(h_{i-1} W_iᵀ + b_i)     y = h_{L-1} W_Lᵀ + b_L
//
// mlp_forward returns y and then the hidden h_1 ... h_{L-1}, which mlp_backward reads. They are tensors of their
// own: the allocator gives very large blocks back to the system, and their pages would be new in every step.
// Layers that the kernels do not cover make the network a chain of linear ops.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "backends.h"
#include "linear.h"

namespace fastmlp {
namespace {

using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::optional<Tensor> bias_of(TensorList biases, size_t layer) {
  return biases.empty() ? std::nullopt : std::optional<Tensor>(biases[layer]);
}

void check_network(const Tensor& input, TensorList weights, TensorList biases) {
  TORCH_CHECK(!weights.empty(), "weights: expected one for each layer, got none");
  TORCH_CHECK(biases.empty() || biases.size() == weights.size(), "biases: expected ", weights.size(),
              ", as many as weights, or none, got ", biases.size());
  check_arguments(input, weights[0], bias_of(biases, 0));
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto name = [i](const char* list) { return std::string(list) + "[" + std::to_string(i) + "]"; };
    const Tensor& weight = weights[i];
    check_same(name("weights"), weight, input);
    TORCH_CHECK(weight.dim() == 2, name("weights"), ": expected shape [out_features, in_features], got ",
                weight.sym_sizes());
    if (i > 0)
      TORCH_CHECK(weight.sym_size(1) == weights[i - 1].sym_size(0), name("weights"), ": expected shape [*, ",
                  weights[i - 1].sym_size(0), "] after weights of shape ", weights[i - 1].sym_sizes(),
                  ", got ", weight.sym_sizes());
    if (biases.empty()) continue;
    check_same(name("biases"), biases[i], input);
    TORCH_CHECK(biases[i].dim() == 1 && biases[i].sym_size(0) == weight.sym_size(0), name("biases"),
                ": expected shape [", weight.sym_size(0), "] for weights of shape ", weight.sym_sizes(),
                ", got ", biases[i].sym_sizes());
  }
}

bool is_fused(const Tensor& input, TensorList weights, TensorList biases) {
  for (size_t i = 0; i < weights.size(); ++i)
    if (why_not_fused(input, weights[i], bias_of(biases, i))) return false;
  return true;
}

// ---- through the dispatcher

Tensor call_mlp(const Tensor& input, TensorList weights, TensorList biases, std::string_view activation) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastmlp::mlp", "").typed<decltype(call_mlp)>();
  return op.call(input, weights, biases, activation);
}

std::vector<Tensor> call_mlp_forward(const Tensor& input, TensorList weights, TensorList biases,
                                     std::string_view activation) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastmlp::mlp_forward", "")
                             .typed<decltype(call_mlp_forward)>();
  return op.call(input, weights, biases, activation);
}

std::vector<Tensor> call_mlp_backward(const Tensor& grad_y, const Tensor& input, TensorList weights,
                                      TensorList biases, TensorList hidden, std::string_view activation,
                                      at::IntArrayRef wanted) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastmlp::mlp_backward", "")
                             .typed<decltype(call_mlp_backward)>();
  return op.call(grad_y, input, weights, biases, hidden, activation, wanted);
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

// The gradients are numbered as the arguments are: input, the weights, the biases.
std::vector<Tensor> mlp_backward_composite(const Tensor& grad_y, const Tensor& input, TensorList weights,
                                           TensorList biases, TensorList, std::string_view activation,
                                           at::IntArrayRef wanted) {
  const size_t L = weights.size();
  std::vector<Tensor> h = {input}, grads(1 + 2 * L), result;
  for (size_t i = 0; i + 1 < L; ++i)
    h.push_back(linear_composite(h[i], weights[i], bias_of(biases, i), activation));
  Tensor grad = grad_y;
  for (size_t i = L; i-- > 0;) {
    const bool last = i + 1 == L;
    const auto y = last ? std::nullopt : std::optional<Tensor>(h[i + 1]);
    std::tie(grad, grads[1 + i], grads[1 + L + i]) = linear_backward_composite(
        grad, h[i], weights[i], y, last ? "identity" : activation, {true, true, !biases.empty()});
  }
  grads[0] = grad;
  for (const int64_t index : wanted) result.push_back(grads[index]);
  return result;
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
    outputs.push_back(empty({M, weights[i].size(0)}, input.options()));
  const Tensor x = as_matrix(input, M, input.size(-1));
  std::vector<Tensor> contiguous;  // biases, alive until the kernels have run
  std::vector<Forward> layers;
  for (int64_t i = 0; i < L; ++i) {
    const bool last = i + 1 == L;
    if (!biases.empty()) contiguous.push_back(biases[i].contiguous());
    layers.push_back({.dtype = dtype_of(input),
                      .reduced = is_reduced(input),
                      .activation = last ? Activation::identity : g,
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
std::vector<Tensor> mlp_backward(const Tensor& grad_y, const Tensor& input, TensorList weights,
                                 TensorList biases, TensorList hidden, std::string_view activation,
                                 at::IntArrayRef wanted) {
  const Activation g = parse_activation(activation);
  check_network(input, weights, biases);
  TORCH_CHECK(is_fused(input, weights, biases), "mlp_backward: the kernels do not cover these arguments");
  const c10::DeviceGuard guard(input.device());
  const int64_t M = rows_of(input), L = int64_t(weights.size());
  TORCH_CHECK(int64_t(hidden.size()) == L - 1, "hidden: expected ", L - 1, " tensors, got ", hidden.size());
  for (int64_t i = 0; i + 1 < L; ++i) {
    check_same("hidden", hidden[i], input);
    TORCH_CHECK(hidden[i].is_contiguous() && hidden[i].numel() == M * weights[i].size(0),
                "hidden: expected what mlp_forward gave");
  }
  check_same("grad_y", grad_y, input);
  TORCH_CHECK(grad_y.numel() == M * weights.back().size(0), "grad_y: expected the shape of the result, got ",
              grad_y.sizes());

  std::vector<Tensor> grads(1 + 2 * L), result;
  int64_t lowest = L;  // the first layer that anyone asks about
  for (const int64_t index : wanted) {
    TORCH_CHECK(0 <= index && index < 1 + L + int64_t(biases.size()),
                "wanted: expected numbers of arguments, got ", index);
    const Tensor& like = index == 0 ? input : index <= L ? weights[index - 1] : biases[index - 1 - L];
    grads[index] = empty(like.sizes(), input.options());
    lowest = std::min(lowest, index ? (index - 1) % L : 0);
  }
  const Tensor dy = grad_y.contiguous(), x = as_matrix(input, M, input.size(-1));
  const auto data = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
  std::vector<Backward> layers;
  for (int64_t i = L - 1; i >= lowest; --i) {
    const bool last = i + 1 == L;
    layers.push_back({.dtype = dtype_of(input),
                      .reduced = is_reduced(input),
                      .activation = last ? Activation::identity : g,
                      .M = M,
                      .N = weights[i].size(0),
                      .K = weights[i].size(1),
                      .grad_y = last ? dy.const_data_ptr() : nullptr,
                      .y = last ? nullptr : hidden[i].const_data_ptr(),
                      .x = i ? hidden[i - 1].const_data_ptr() : x.const_data_ptr(),
                      .ldx = i ? weights[i].size(1) : x.stride(0),
                      .weight = weights[i].const_data_ptr(),
                      .ldw = weights[i].stride(0),
                      .grad_x = i == 0 ? data(grads[0]) : nullptr,
                      .grad_weight = data(grads[1 + i]),
                      .grad_bias = data(grads[1 + L + i])});
  }
  if (!layers.empty()) run<Device>(layers.data(), int64_t(layers.size()), input);
  for (const int64_t index : wanted) result.push_back(grads[index]);
  return result;
}

// ---- shapes alone, for tracing

Tensor mlp_meta(const Tensor& input, TensorList weights, TensorList biases, std::string_view activation) {
  parse_activation(activation);
  check_network(input, weights, biases);
  c10::SymDimVector sizes(input.sym_sizes());
  sizes.back() = weights.back().sym_size(0);
  return at::empty_symint(sizes, input.options());
}

std::vector<Tensor> mlp_forward_meta(const Tensor& input, TensorList weights, TensorList biases,
                                     std::string_view activation) {
  std::vector<Tensor> outputs = {mlp_meta(input, weights, biases, activation)};
  c10::SymInt M = 1;
  for (int64_t i = 0; i + 1 < input.dim(); ++i) M = M * input.sym_size(i);
  for (size_t i = 0; i + 1 < weights.size(); ++i)
    outputs.push_back(at::empty_symint({M, weights[i].sym_size(0)}, input.options()));
  return outputs;
}

std::vector<Tensor> mlp_backward_meta(const Tensor&, const Tensor& input, TensorList weights,
                                      TensorList biases, TensorList, std::string_view,
                                      at::IntArrayRef wanted) {
  const int64_t L = int64_t(weights.size());
  std::vector<Tensor> grads;
  for (const int64_t index : wanted) {
    const Tensor& like = index == 0 ? input : index <= L ? weights[index - 1] : biases[index - 1 - L];
    grads.push_back(at::empty_symint(like.sym_sizes(), input.options()));
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

  static Tensor forward(AutogradContext* ctx, const Tensor& input, TensorList weights, TensorList biases,
                        std::string_view activation) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list outputs = call_mlp_forward(input, weights, biases, activation);
    variable_list saved = {input};
    saved.insert(saved.end(), weights.begin(), weights.end());
    saved.insert(saved.end(), biases.begin(), biases.end());
    saved.insert(saved.end(), outputs.begin() + 1, outputs.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["layers"] = int64_t(weights.size());
    return outputs[0];
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_y) {
    const variable_list saved = ctx->get_saved_variables();
    const size_t L = size_t(ctx->saved_data["layers"].toInt());
    const TensorList arguments = TensorList(saved).slice(0, saved.size() - (L - 1));
    const TensorList hidden = TensorList(saved).slice(arguments.size());
    std::vector<int64_t> wanted;
    for (size_t i = 0; i < arguments.size(); ++i)
      if (ctx->needs_input_grad(i)) wanted.push_back(int64_t(i));
    const auto found =
        call_mlp_backward(grad_y[0], arguments[0], arguments.slice(1, L), arguments.slice(1 + L), hidden,
                          ctx->saved_data["activation"].toStringRef(), wanted);
    variable_list grads(arguments.size() + 1);  // the last is the activation's
    for (size_t i = 0; i < wanted.size(); ++i) grads[wanted[i]] = found[i];
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
    return MlpFunction::apply(input, weights, biases, activation);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_mlp(input, weights, biases, activation);
}

std::vector<Tensor> mlp_backward_autograd(const Tensor& grad_y, const Tensor& input, TensorList weights,
                                          TensorList biases, TensorList hidden, std::string_view activation,
                                          at::IntArrayRef wanted) {
  if (at::GradMode::is_enabled() && (grad_y.requires_grad() || input.requires_grad() ||
                                     is_differentiated(weights) || is_differentiated(biases)))
    return mlp_backward_composite(grad_y, input, weights, biases, hidden, activation, wanted);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_mlp_backward(grad_y, input, weights, biases, hidden, activation, wanted);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastmlp, m) {
  m.def("mlp(Tensor input, Tensor[] weights, Tensor[] biases, str activation='relu') -> Tensor");
  m.def("mlp_forward(Tensor input, Tensor[] weights, Tensor[] biases, str activation) -> Tensor[]");
  m.def(
      "mlp_backward(Tensor grad_y, Tensor input, Tensor[] weights, Tensor[] biases, Tensor[] hidden, "
      "str activation, int[] wanted) -> Tensor[]");
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
TORCH_LIBRARY_IMPL(fastmlp, CompositeExplicitAutograd, m) { m.impl("mlp", mlp_by_layers); }
TORCH_LIBRARY_IMPL(fastmlp, FuncTorchBatched, m) { m.impl("mlp", mlp_by_layers); }
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
