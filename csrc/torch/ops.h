// The ops that C++ calls, through the dispatcher: autocast, tracing, profilers and modes see the call.
#pragma once

#include <ATen/core/List.h>
#include <torch/csrc/autograd/function.h>

#include "activations.h"
#include "checks.h"

namespace fastmlp {

using OptionalTensors = c10::List<OptionalTensor>;

Tensor call_network(const Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                    Names activations, Numbers parameters);
std::vector<Tensor> call_network_forward(const Tensor& input, at::TensorList weights,
                                         const OptionalTensors& biases, Names activations,
                                         Numbers parameters);
std::vector<Tensor> call_network_backward(const Tensor& grad_y, const OptionalTensor& input,
                                          const OptionalTensors& weights, const OptionalTensors& saved,
                                          Names activations, Numbers parameters, at::IntArrayRef wanted);
// What of a scalar's gradient arrives at the output of a network, if anything does, and what the layers have left for
// backward; and what reaches the parameters by other ways, undefined where nothing does.
struct Arrival {
  Tensor grad_y;
  std::vector<Tensor> left, others;
};

// Differentiates down to the autograd node of a network, without running it; none where the node is another. Raises as
// torch.autograd.grad does.
std::optional<Arrival> differentiate_down_to(torch::autograd::Node& node, const Tensor& value,
                                             const std::vector<Tensor>& params);

bool call_optimize(std::string_view name, at::TensorList params, at::TensorList grads, at::TensorList states,
                   at::TensorList counts, at::ArrayRef<double> options);
OptionalTensor call_clip_grad_norm(at::TensorList grads, double max_norm, bool error_if_nonfinite);

}  // namespace fastmlp
