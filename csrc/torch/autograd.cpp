// The autograd node of a network, which calls the ops beneath: tracing then sees them.
//
// Gradients of gradients need no code of their own. Where a gradient is itself to be differentiated, network_backward is
// torch's own operations.
#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>

#include "ensemble.h"

namespace fastmlp {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// torch.utils.checkpoint pairs what the first forward pass saves with what the second one does, by order and shape. A
// hook or a mode may send one of them through stock's operations and the other through ours. So where saved tensors are
// watched, each layer is a node by itself, and saves what stock's do in their order and orientation: x and Wᵀ of addmm
// (of mm, without bias, Wᵀ and x), then y or z.
bool is_watched() { return at::SavedTensorDefaultHooks::get_hooks().has_value(); }

// A weight as it is saved: still a function of the parameter, for gradients of gradients.
Tensor transposed(const Tensor& weight) {
  const at::AutoGradMode guard(true);
  return weight.t();
}

// Whether and where a node keeps what arrives at it, and passes nothing on.
thread_local const AutogradContext* keeping = nullptr;
thread_local Arrival* kept = nullptr;

bool is_defined(const Tensor& t) { return t.defined(); }
OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// Runs a network. To `saved` goes what backward will read, as stock's layers keep it, and nothing else: x for dW, W for dx,
// y or z for g'; in all the input, the weights, and what the layers leave.
variable_list run_and_save(const Network& n, bool transposes, variable_list& saved) {
  const size_t begin = saved.size();
  saved.resize(begin + 1 + 2 * n.size);
  Tensor* const own = &saved[begin];
  c10::SmallVector<bool, 8> keeps(n.size);
  bool has_grad = n.input.requires_grad();
  for (size_t i = 0; i < n.size; ++i) {
    if (has_grad) own[1 + i] = transposes ? transposed(n.weights[i]) : n.weights[i];
    if (n.weights[i].requires_grad()) {
      if (i == 0) own[0] = n.input;
      else keeps[i - 1] = true;
    }
    has_grad |= n.weights[i].requires_grad() || (n.biases[i] && n.biases[i]->requires_grad());
    keeps[i] = has_grad && n.activations[i].reads != Reads::nothing;
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  variable_list outputs = call_network_forward(n.input, n.weights, n.bias_list, n.names, n.parameters);
  for (size_t i = 0; i < n.size; ++i)
    if (keeps[i]) own[1 + n.size + i] = outputs[n.leaves(i) ? 1 + i : 0];
  return outputs;
}

// What a node knows of its networks beside tensors: of each layer, the number of its activation, and whether it has a bias.
struct Recorded {
  static void record(AutogradContext* ctx, const Network& n) {
    std::vector<int64_t> layers;
    for (size_t i = 0; i < n.size; ++i)
      layers.insert(layers.end(),
                    {n.activations[i].formula - formulas.data(), int64_t(n.biases[i].has_value())});
    ctx->set_materialize_grads(false);
    ctx->saved_data["layers"] = std::move(layers);
    if (!n.parameters.empty()) ctx->saved_data["parameters"] = n.parameters;
  }

  explicit Recorded(AutogradContext* ctx)
      : layers(ctx->saved_data["layers"].toIntVector()), size(layers.size() / 2), numbers(1 + size) {
    if (ctx->saved_data.count("parameters")) parameters = ctx->saved_data["parameters"].toDoubleVector();
    std::iota(numbers.begin(), numbers.end(), 0);
    for (size_t i = 0; i < size; ++i) {
      names.emplace_back(formulas[layers[2 * i]].name);
      if (layers[2 * i + 1]) numbers.push_back(int64_t(1 + size + i));
    }
  }

  // The gradients of a network's inputs that are wanted, undefined where there are none.
  variable_list differentiate(TensorList saved, TensorList grad_outputs, at::IntArrayRef wanted) const {
    const bool of_y_alone = std::none_of(grad_outputs.begin() + 1, grad_outputs.end(), is_defined);
    if (wanted.empty() || (of_y_alone && !grad_outputs[0].defined())) return variable_list(wanted.size());
    OptionalTensors weights, left;
    for (size_t i = 0; i < size; ++i) {
      weights.push_back(optional(saved[1 + i]));
      left.push_back(optional(saved[1 + size + i]));
    }
    const OptionalTensor input = optional(saved[0]);
    if (of_y_alone)
      return call_network_backward(grad_outputs[0], input, weights, left, names, parameters, wanted);
    return run_composite({grad_outputs[0], input, weights, left, names, parameters, wanted}, grad_outputs);
  }

  std::vector<int64_t> layers;
  size_t size;
  std::vector<double> parameters;
  c10::SmallVector<std::string, 4> names;
  c10::SmallVector<int64_t, 9> numbers;  // of a network's inputs, as network_backward has them
};

struct NetworkFunction : torch::autograd::Function<NetworkFunction> {
  static constexpr bool is_traceable = true;

  // The input, the weights and those biases that are there are the node's inputs.
  static variable_list forward(AutogradContext* ctx, const Tensor&, TensorList, TensorList,
                               const Network& n) {
    const bool transposes = is_watched();
    variable_list saved, outputs = run_and_save(n, transposes, saved);
    Recorded::record(ctx, n);
    if (n.size == 1 && !n.biases[0]) std::swap(saved[0], saved[1]);
    ctx->save_for_backward(std::move(saved));
    if (transposes) ctx->saved_data["transposes"] = true;
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const Recorded own(ctx);
    variable_list saved = ctx->get_saved_variables();
    if (own.size == 1 && !own.layers[1]) std::swap(saved[0], saved[1]);
    if (ctx->saved_data.count("transposes") && saved[1].defined()) saved[1] = saved[1].t();
    c10::SmallVector<int64_t, 9> wanted;
    for (size_t i = 0; i < own.numbers.size(); ++i)
      if (ctx->needs_input_grad(i)) wanted.push_back(own.numbers[i]);
    variable_list found, grads(own.numbers.size() + 1);  // the last is that of the argument n
    if (ctx == keeping && std::none_of(grad_outputs.begin() + 1, grad_outputs.end(), is_defined))
      kept->grad_y = grad_outputs[0], kept->left.assign(saved.end() - int64_t(own.size), saved.end());
    else found = own.differentiate(saved, grad_outputs, wanted);
    for (size_t i = 0, next = 0; next < found.size(); ++i)
      if (ctx->needs_input_grad(i)) grads[i] = std::move(found[next++]);
    return grads;
  }
};

// Networks with the same activations and biases side by side, inputs and outputs one network's after the other's.
struct EnsembleFunction : torch::autograd::Function<EnsembleFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, TensorList, const Networks& networks) {
    variable_list saved, outputs;
    Together together;
    for (size_t n = 0; n < networks.count; ++n) {
      const Network own = networks[n];
      if (n == 0) Recorded::record(ctx, own);
      for (Tensor& output : run_and_save(own, false, saved)) outputs.push_back(std::move(output));
    }
    together.run();
    ctx->save_for_backward(std::move(saved));
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const Recorded own(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const size_t kept_by_one = 1 + 2 * own.size, networks = saved.size() / kept_by_one,
                 outputs = grad_outputs.size() / networks, inputs = own.numbers.size();
    c10::DispatchKeySet keys(c10::DispatchKey::CPU);
    for (const Tensor& grad : grad_outputs)
      if (grad.defined()) keys = keys | grad.key_set();
    std::optional<Together> together;
    if (!at::GradMode::is_enabled() && nobody_sees(keys)) together.emplace();
    variable_list grads(networks * inputs + 1);  // the last is that of the argument networks
    for (size_t n = 0; n < networks; ++n) {
      c10::SmallVector<int64_t, 9> wanted;
      c10::SmallVector<size_t, 9> places;
      for (size_t i = 0; i < inputs; ++i)
        if (ctx->needs_input_grad(n * inputs + i))
          wanted.push_back(own.numbers[i]), places.push_back(n * inputs + i);
      variable_list found = own.differentiate(TensorList(saved).slice(n * kept_by_one, kept_by_one),
                                              TensorList(grad_outputs).slice(n * outputs, outputs), wanted);
      for (size_t k = 0; k < found.size(); ++k) grads[places[k]] = std::move(found[k]);
    }
    if (together) together->run();
    return grads;
  }
};

}  // namespace

std::optional<Arrival> differentiate_down_to(torch::autograd::Node& node, const Tensor& value,
                                             const variable_list& params) {
  auto* const own = dynamic_cast<torch::autograd::CppNode<NetworkFunction>*>(&node);
  if (!own) return std::nullopt;
  Arrival arrival;
  struct Keeping {  // on this thread, which runs all that is on the CPU
    Keeping(const AutogradContext* ctx, Arrival* arrival) { keeping = ctx, kept = arrival; }
    ~Keeping() { keeping = nullptr, kept = nullptr; }
  } const guard(&own->ctx_, &arrival);
  arrival.others = torch::autograd::grad({value}, params, {}, std::nullopt, false, true);
  return arrival;
}

variable_list call_networks(const Networks& networks) {
  variable_list inputs, ys;
  for (size_t n = 0; n < networks.count; ++n) {
    const Network own = networks[n];
    inputs.push_back(own.input);
    inputs.insert(inputs.end(), own.weights.begin(), own.weights.end());
    for (const OptionalTensor& bias : own.biases)
      if (bias) inputs.push_back(*bias);
  }
  variable_list outputs = EnsembleFunction::apply(TensorList(inputs), networks);
  for (size_t n = 0; n < networks.count; ++n)
    ys.push_back(std::move(outputs[n * (outputs.size() / networks.count)]));
  return ys;
}

namespace {

bool needs_grad(const OptionalTensor& t) { return t && t->requires_grad(); }

Tensor network_autograd(const Network& n) {
  if (why_not_fused(n)) return network_by_layers(n);
  c10::SmallVector<Tensor, 4> biases;
  bool has_grad = n.input.requires_grad();
  for (size_t i = 0; i < n.size; ++i) {
    const OptionalTensor& bias = n.biases[i];
    has_grad |= n.weights[i].requires_grad() || needs_grad(bias);
    if (bias) biases.push_back(*bias);
  }
  if (at::GradMode::is_enabled() && has_grad) {
    if (n.size > 1 && is_watched()) return network_by_layers(n);
    return NetworkFunction::apply(n.input, n.weights, TensorList(biases), n)[0];
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_network(n.input, n.weights, n.bias_list, n.names, n.parameters);
}

std::vector<Tensor> network_backward_autograd(const Backpropagation& b) {
  bool has_grad = b.grad_y.requires_grad() || needs_grad(b.input);
  for (size_t i = 0; i < b.size; ++i) has_grad |= needs_grad(b.weights[i]) || needs_grad(b.saved[i]);
  if (at::GradMode::is_enabled() && has_grad) return network_backward_composite(b);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_network_backward(b.grad_y, b.input, b.weight_list, b.saved_list, b.names, b.parameters,
                               b.wanted);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmlp, Autograd, m) {
  m.impl("network", forward_op<network_autograd>);
  m.impl("network_backward", backward_op<network_backward_autograd>);
}
}  // namespace fastmlp
