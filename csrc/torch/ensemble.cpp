// Networks of equal shapes side by side, as one autograd node and one call of the kernels:
//
//   h_n0 = x or x_n     h_ni = g_i(h_n,i-1 W_niᵀ + b_ni)     y [networks, batch, out_features]
//
// The node is that of a network, with one more dimension: what the layers leave for backward is an output of it too, so
// that gradients of gradients need no code of their own. Where they are wanted, or where somebody looks on, backward goes
// network by network through the op network_backward.
#include "ensemble.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "call.h"
#include "network.h"

namespace fastmlp {

namespace {

bool are_equal(PyObject* a, PyObject* b) {
  const int result = PyObject_RichCompareBool(a, b, Py_EQ);
  if (result < 0) throw python_error();
  return result;
}

bool is_matrix(const Tensor& t) { return t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1); }
bool is_vector(const Tensor& t) { return t.dim() == 1 && (t.size(0) <= 1 || t.stride(0) == 1); }

}  // namespace

bool Networks::find(PyObject* known, PyObject* models, const Tensor& input) {
  if (!find_chains(known, models, chains) || chains.empty()) return false;
  const Chain& first = chains.front();
  count = chains.size(), layers = first.weights.size();
  c10::DispatchKeySet keys = input.key_set();
  bool is_fitting = layers > 0 && !input._fw_grad(0).defined();
  for (size_t n = 0; n < count && is_fitting; ++n) {
    const Chain& own = chains[n];
    if (own.weights.size() != layers || !own.views.empty()) return false;
    for (size_t i = 0; i < layers && is_fitting; ++i) {
      const bool has_bias = own.biases[i] != Py_None;
      if (!is_plain(own.weights[i]) || (has_bias && !is_plain(own.biases[i])) ||
          (n > 0 && !are_equal(own.activations[i], first.activations[i])))
        return false;
      const Tensor& weight = weights.emplace_back(THPVariable_Unpack(own.weights[i]));
      const Tensor& bias = biases.emplace_back(has_bias ? THPVariable_Unpack(own.biases[i]) : Tensor());
      const auto is_as_first = [&](const Tensor& t, const Tensor& of_first) {
        if (t.defined() != of_first.defined()) return false;
        if (!t.defined()) return true;
        keys = keys | t.key_set();
        return t.scalar_type() == input.scalar_type() && t.sizes() == of_first.sizes() &&
               t.requires_grad() == of_first.requires_grad() && !t._fw_grad(0).defined();
      };
      is_fitting = is_as_first(weight, this->weight(0, i)) && is_as_first(bias, this->bias(0, i)) &&
                   is_matrix(weight) && (i == 0 || weight.size(1) == this->weight(n, i - 1).size(0)) &&
                   (!has_bias || (is_vector(bias) && bias.size(0) == weight.size(0)));
    }
  }
  if (!is_fitting || !nobody_sees(keys) || why_not_multiplied(input)) return false;
  K = weights.front().size(1), N = weights.back().size(0);
  named.emplace(first.activations);
  activations = parse_activations(named->names, named->parameters);
  return true;
}

bool Networks::takes(const Tensor& input) const {
  const bool is_one_each = input.dim() == 3 && input.size(0) == int64_t(count);
  return (input.dim() == 2 || is_one_each) && input.size(-1) == K;
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr auto optional = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };

// y, and behind it what the layers leave for backward where that is wanted.
variable_list run_networks(const Networks& own, const Tensor& input, bool leaves) {
  const int64_t M = input.size(-2), networks = int64_t(own.count);
  const PerNetwork x(input, 2);
  const bool reduced = is_reduced(input);
  variable_list outputs(1);
  std::vector<Forward> calls;
  calls.resize(own.count * own.layers);
  for (size_t i = 0; i < own.layers; ++i) {
    const LayerActivation& g = own.activations[i];
    const int64_t N = own.weight(0, i).size(0), K = own.weight(0, i).size(1);
    const bool is_last = i + 1 == own.layers;
    const auto output = [&] { return empty({networks, M, N}, input.options()); };
    Tensor h, z;
    if (leaves && (!is_last || g.reads_z())) outputs.push_back((g.reads_z() ? z : h) = output());
    if (is_last) outputs[0] = h = output();
    for (size_t n = 0; n < own.count; ++n) {
      const auto place = [&](const Tensor& t) {
        return t.defined() ? static_cast<char*>(t.mutable_data_ptr()) + int64_t(n) * M * N * t.element_size()
                           : nullptr;
      };
      Forward* const p = &calls[n * own.layers + i];
      const Tensor& bias = own.bias(n, i);
      *p = {.dtype = dtype_of(input),
            .reduced = reduced,
            .activation = g.kernel_for(input.scalar_type()),
            .M = M,
            .N = N,
            .K = K,
            .x = i ? p[-1].y : x[n],
            .ldx = i ? K : input.stride(-2),
            .weight = own.weight(n, i).const_data_ptr(),
            .ldw = own.weight(n, i).stride(0),
            .bias = bias.defined() ? bias.const_data_ptr() : nullptr,
            .y = place(h),
            .z = place(z)};
    }
  }
  const int threads = at::get_num_threads();
  const int64_t L = int64_t(own.layers), bytes = cpu::forward_workspace(calls.data(), L, networks, threads);
  const Tensor workspace = empty({bytes}, at::kByte);
  cpu::forward(calls.data(), L, networks, workspace.mutable_data_ptr(), threads);
  return outputs;
}

// What backward has saved. Gradients of a network are numbered as those of network_backward: input, weights, biases.
struct Backpropagations {
  explicit Backpropagations(AutogradContext* ctx)
      : shape(ctx->saved_data["layers"].toIntVector()),
        parameters(ctx->saved_data["parameters"].toDoubleVector()),
        saved(ctx->get_saved_variables()),
        L(shape.size() / 2),
        count(size_t(ctx->saved_data["networks"].toInt())) {
    for (size_t i = 0; i < L; ++i) {
      names.emplace_back(formulas[size_t(shape[2 * i])].name);
      numbers.push_back(int64_t(1 + i));
    }
    for (size_t i = 0; i < L; ++i)
      if (shape[2 * i + 1]) numbers.push_back(int64_t(1 + L + i));
  }
  // The node's inputs: x, and each network's parameters.
  size_t input_of(size_t n, size_t j) const { return 1 + n * numbers.size() + j; }
  const Tensor& input() const { return saved[0]; }
  const Tensor& weight(size_t n, size_t i) const { return saved[1 + n * L + i]; }
  const Tensor& left(size_t i) const { return saved[1 + count * L + i]; }

  std::vector<int64_t> shape;  // of each layer, the number of its activation, and whether it has a bias
  std::vector<double> parameters;
  variable_list saved;
  size_t L, count;
  std::vector<std::string> names;
  std::vector<int64_t> numbers;  // of a network's parameters
};

Tensor part(const Tensor& t, size_t n) { return t.defined() ? t.select(0, int64_t(n)) : t; }

// One network's, in the order of `wanted`, by an op.
variable_list run_network(const Backpropagations& own, size_t n, const variable_list& grads,
                          at::IntArrayRef wanted) {
  variable_list own_grads;
  for (const Tensor& grad : grads) own_grads.push_back(part(grad, n));
  const bool of_y_alone =
      std::none_of(grads.begin() + 1, grads.end(), [](const Tensor& t) { return t.defined(); });
  if (of_y_alone && !grads[0].defined()) return variable_list(wanted.size());
  OptionalTensors weights, left;
  for (size_t i = 0; i < own.L; ++i) {
    weights.push_back(optional(own.weight(n, i)));
    left.push_back(optional(part(own.left(i), n)));
  }
  const Tensor& x = own.input();
  const OptionalTensor input = optional(x.defined() && x.dim() == 3 ? part(x, n) : x);
  return of_y_alone
             ? call_network_backward(own_grads[0], input, weights, left, own.names, own.parameters, wanted)
             : run_composite({own_grads[0], input, weights, left, own.names, own.parameters, wanted},
                             own_grads);
}

// The gradients of the node's inputs that are wanted; of x, for each network.
variable_list run_networks(const Backpropagations& own, const Tensor& grad_y, at::ArrayRef<bool> wanted) {
  const int64_t M = grad_y.size(1), networks = int64_t(own.count);
  const LayerActivations activations = parse_activations(own.names, own.parameters);
  const at::ScalarType dtype = grad_y.scalar_type();
  const bool reduced = is_reduced(grad_y);
  variable_list grads(wanted.size());
  // What each number of a gradient is among the node's inputs, of the first network; and the lowest layer asked of.
  c10::SmallVector<size_t, 16> place(1 + 2 * own.L);
  size_t lowest = wanted[0] ? 0 : own.L;
  for (size_t j = 0; j < own.numbers.size(); ++j) {
    place[size_t(own.numbers[j])] = own.input_of(0, j);
    for (size_t n = 0; n < own.count; ++n)
      if (wanted[own.input_of(n, j)]) lowest = std::min(lowest, size_t(own.numbers[j] - 1) % own.L);
  }
  std::vector<Backward> calls;
  for (size_t n = 0; n < own.count; ++n) {
    const auto output = [&](size_t number, at::IntArrayRef sizes) -> void* {
      const size_t index = place[number] + n * own.numbers.size();
      if (!place[number] || !wanted[index]) return nullptr;
      return (grads[index] = empty(sizes, grad_y.options())).mutable_data_ptr();
    };
    int64_t N = grad_y.size(2);
    for (size_t i = own.L; i-- > lowest;) {
      const Tensor& weight = own.weight(n, i);
      const Tensor& x = i ? own.left(i - 1) : own.input();
      Backward p{};
      p.dtype = dtype_of(grad_y);
      p.reduced = reduced;
      p.activation = activations[i].kernel_for(dtype);
      p.M = M, p.N = N;
      p.grad_y = i + 1 == own.L ? PerNetwork(grad_y, 2)[n] : nullptr;
      if (activations[i].reads != Reads::nothing) p.saved = PerNetwork(own.left(i), 2)[n];
      if (weight.defined())
        p.K = weight.size(1), p.weight = weight.const_data_ptr(), p.ldw = weight.stride(0);
      if (i == 0 && wanted[0]) {
        if (!grads[0].defined()) grads[0] = empty({networks, M, p.K}, grad_y.options());
        p.grad_x = grads[0].select(0, int64_t(n)).mutable_data_ptr();
      }
      if (x.defined()) {
        p.K = x.size(-1);
        p.x = PerNetwork(x, 2)[n];
        p.ldx = x.stride(-2);
        if (i > 0 && activations[i - 1].reads_z()) p.x_activation = activations[i - 1].kernel_for(dtype);
        p.grad_weight = output(1 + i, {N, p.K});
      }
      p.grad_bias = output(1 + own.L + i, {N});
      calls.push_back(p);
      N = p.K;
    }
  }
  if (calls.empty()) return grads;
  const int threads = at::get_num_threads();
  const int64_t count = int64_t(own.L - lowest),
                bytes = cpu::backward_workspace(calls.data(), count, networks, threads);
  const Tensor workspace = empty({bytes}, at::kByte);
  cpu::backward(calls.data(), count, networks, workspace.mutable_data_ptr(), threads);
  return grads;
}

struct EnsembleFunction : torch::autograd::Function<EnsembleFunction> {
  static constexpr bool is_traceable = true;

  // Saves what the nodes of the networks would, and nothing else: x for dW, W for dx, y or z for g'.
  static variable_list forward(AutogradContext* ctx, const Tensor& input, at::TensorList,
                               const Networks& own) {
    const size_t L = own.layers;
    variable_list saved(1 + own.count * L + L);
    std::vector<int64_t> layers;
    c10::SmallVector<bool, 8> keeps(L);
    bool has_grad = input.requires_grad();
    for (size_t i = 0; i < L; ++i) {
      const Tensor &weight = own.weight(0, i), &bias = own.bias(0, i);
      layers.insert(layers.end(), {own.activations[i].formula - formulas.data(), bias.defined()});
      for (size_t n = 0; has_grad && n < own.count; ++n) saved[1 + n * L + i] = own.weight(n, i);
      if (weight.requires_grad()) {
        if (i == 0) saved[0] = input;
        else keeps[i - 1] = true;
      }
      has_grad |= weight.requires_grad() || (bias.defined() && bias.requires_grad());
      keeps[i] = has_grad && own.activations[i].reads != Reads::nothing;
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    variable_list outputs = run_networks(own, input, true);
    for (size_t i = 0; i < L; ++i)
      if (keeps[i])
        saved[1 + own.count * L + i] = outputs[i + 1 < L || own.activations[i].reads_z() ? 1 + i : 0];
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->saved_data["layers"] = std::move(layers);
    ctx->saved_data["networks"] = int64_t(own.count);
    ctx->saved_data["shared"] = input.dim() == 2;
    ctx->saved_data["parameters"] =
        std::vector<double>(own.named->parameters.begin(), own.named->parameters.end());
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const Backpropagations own(ctx);
    const Tensor& grad_y = grad_outputs[0];
    c10::SmallVector<bool, 64> wanted;
    for (size_t i = 0; i < own.input_of(own.count, 0); ++i) wanted.push_back(ctx->needs_input_grad(i));
    const bool of_y_alone = std::none_of(grad_outputs.begin() + 1, grad_outputs.end(),
                                         [](const Tensor& t) { return t.defined(); });
    const bool is_shared = ctx->saved_data["shared"].toBool();
    variable_list grads;
    if (of_y_alone && grad_y.defined() && !at::GradMode::is_enabled() && nobody_sees(grad_y.key_set()) &&
        !why_not_multiplied(grad_y)) {
      const at::AutoDispatchBelowADInplaceOrView guard;
      grads = run_networks(own, grad_y.contiguous(), wanted);
    } else {
      grads = run_one_by_one(own, grad_outputs, wanted);
    }
    if (grads[0].defined() && is_shared) grads[0] = grads[0].sum(0);
    grads.emplace_back();  // that of the networks
    return grads;
  }

  static variable_list run_one_by_one(const Backpropagations& own, const variable_list& grad_outputs,
                                      at::ArrayRef<bool> wanted) {
    variable_list grads(wanted.size()), of_x;
    for (size_t n = 0; n < own.count; ++n) {
      c10::SmallVector<int64_t, 16> numbers, places;
      if (wanted[0]) numbers.push_back(0), places.push_back(0);
      for (size_t j = 0; j < own.numbers.size(); ++j)
        if (wanted[own.input_of(n, j)])
          numbers.push_back(own.numbers[j]), places.push_back(int64_t(own.input_of(n, j)));
      const variable_list found = run_network(own, n, grad_outputs, numbers);
      for (size_t k = 0; k < found.size(); ++k) {
        if (places[k]) grads[size_t(places[k])] = found[k];
        else of_x.push_back(found[k]);
      }
    }
    if (!of_x.empty() && of_x[0].defined()) grads[0] = at::stack(of_x);
    return grads;
  }
};

}  // namespace

PyObject* ensemble(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3 && is_list(arguments[1]),
                   "ensemble: expected what is known, models and an input");
  if (!is_plain(arguments[2])) Py_RETURN_NOTIMPLEMENTED;
  const Tensor input = THPVariable_Unpack(arguments[2]);
  Networks own;
  if (at::SavedTensorDefaultHooks::get_hooks() || !own.find(arguments[0], arguments[1], input) ||
      !own.takes(input))
    Py_RETURN_NOTIMPLEMENTED;
  variable_list params;
  bool has_grad = input.requires_grad();
  for (size_t n = 0; n < own.count; ++n) {
    for (size_t i = 0; i < own.layers; ++i) params.push_back(own.weight(n, i));
    for (size_t i = 0; i < own.layers; ++i)
      if (own.bias(n, i).defined()) params.push_back(own.bias(n, i));
  }
  for (const Tensor& t : params) has_grad |= t.requires_grad();
  Tensor y;
  {
    const pybind11::gil_scoped_release no_gil;
    const Tensor x = input.size(-1) <= 1 || input.stride(-1) == 1 ? input : input.contiguous();
    if (has_grad && at::GradMode::is_enabled()) {
      y = EnsembleFunction::apply(x, at::TensorList(params), own)[0];
    } else {
      const at::AutoDispatchBelowADInplaceOrView guard;
      y = run_networks(own, x, false)[0];
    }
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

}  // namespace fastmlp
