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

#include "network.h"

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

struct NetworkFunction : torch::autograd::Function<NetworkFunction> {
  static constexpr bool is_traceable = true;

  // The input, the weights and those biases that are there are the node's inputs. It saves what backward will read, as
  // stock's layers do, and nothing else: x for dW, W for dx, y or z for g'.
  static variable_list forward(AutogradContext* ctx, const Tensor& input, TensorList weights, TensorList,
                               const Network& n) {
    const bool transposes = is_watched();
    variable_list saved(1 + 2 * n.size);  // the input, the weights, what the layers leave
    std::vector<int64_t> layers;          // of each, the number of its activation, and whether it has a bias
    c10::SmallVector<bool, 8> keeps(n.size);
    bool has_grad = input.requires_grad();
    for (size_t i = 0; i < n.size; ++i) {
      const OptionalTensor& bias = n.biases[i];
      layers.insert(layers.end(), {n.activations[i].formula - formulas.data(), bias.has_value()});
      if (has_grad) saved[1 + i] = transposes ? transposed(weights[i]) : weights[i];
      if (weights[i].requires_grad()) {
        if (i == 0) saved[0] = input;
        else keeps[i - 1] = true;
      }
      has_grad |= weights[i].requires_grad() || (bias && bias->requires_grad());
      keeps[i] = has_grad && n.activations[i].reads != Reads::nothing;
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    variable_list outputs = call_network_forward(input, weights, n.bias_list, n.names, n.parameters);
    for (size_t i = 0; i < n.size; ++i)
      if (keeps[i]) saved[1 + n.size + i] = outputs[n.leaves(i) ? 1 + i : 0];
    if (n.size == 1 && !layers[1]) std::swap(saved[0], saved[1]);
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->saved_data["layers"] = std::move(layers);
    if (!n.parameters.empty()) ctx->saved_data["parameters"] = n.parameters;
    if (transposes) ctx->saved_data["transposes"] = true;
    return outputs;
  }

  // The input, the weights and what the layers have left.
  static variable_list saved_of(AutogradContext* ctx) {
    const auto layers = ctx->saved_data["layers"].toIntVector();
    variable_list saved = ctx->get_saved_variables();
    if (layers.size() == 2 && !layers[1]) std::swap(saved[0], saved[1]);
    if (ctx->saved_data.count("transposes") && saved[1].defined()) saved[1] = saved[1].t();
    return saved;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto layers = ctx->saved_data["layers"].toIntVector();
    const auto parameters = ctx->saved_data.count("parameters")
                                ? ctx->saved_data["parameters"].toDoubleVector()
                                : std::vector<double>();
    const size_t L = layers.size() / 2;
    const variable_list saved = saved_of(ctx);
    const auto optional = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    OptionalTensors weights, left;
    c10::SmallVector<std::string, 4> names;
    c10::SmallVector<int64_t, 9> numbers(1 + L);  // of the node's inputs, as network_backward has them
    std::iota(numbers.begin(), numbers.end(), 0);
    for (size_t i = 0; i < L; ++i) {
      weights.push_back(optional(saved[1 + i]));
      left.push_back(optional(saved[1 + L + i]));
      names.emplace_back(formulas[layers[2 * i]].name);
      if (layers[2 * i + 1]) numbers.push_back(int64_t(1 + L + i));
    }
    const OptionalTensor input = optional(saved[0]);
    c10::SmallVector<int64_t, 9> wanted;
    for (size_t i = 0; i < numbers.size(); ++i)
      if (ctx->needs_input_grad(i)) wanted.push_back(numbers[i]);
    const auto is_defined = [](const Tensor& t) { return t.defined(); };
    const bool of_y_alone = std::none_of(grad_outputs.begin() + 1, grad_outputs.end(), is_defined);
    variable_list found, grads(numbers.size() + 1);  // the last is that of the argument n
    if (ctx == keeping && of_y_alone)
      kept->grad_y = grad_outputs[0], kept->left.assign(saved.end() - int64_t(L), saved.end());
    else if (!of_y_alone)
      found = run_composite({grad_outputs[0], input, weights, left, names, parameters, wanted}, grad_outputs);
    else if (grad_outputs[0].defined())
      found = call_network_backward(grad_outputs[0], input, weights, left, names, parameters, wanted);
    for (size_t i = 0, next = 0; next < found.size(); ++i)
      if (ctx->needs_input_grad(i)) grads[i] = found[next++];
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
