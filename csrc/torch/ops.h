// The ops that C++ calls, through the dispatcher: autocast, tracing, profilers and modes see the call.
#pragma once

#include <ATen/core/List.h>

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
Tensor call_train_step(const Tensor& input, const Tensor& target, at::TensorList params,
                       at::TensorList states, at::TensorList counts, const Tensor& workspace,
                       at::IntArrayRef has_bias, Names activations, Numbers parameters, std::string_view loss,
                       bool mean, const OptionalTensor& weight, const OptionalTensor& pos_weight,
                       int64_t ignore_index, double label_smoothing, std::string_view optimizer,
                       Numbers options, at::IntArrayRef numbers);
OptionalTensor call_clip_grad_norm(at::TensorList grads, double max_norm, bool error_if_nonfinite);

}  // namespace fastmlp
