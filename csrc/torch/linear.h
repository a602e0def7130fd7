// What the files of the ops share: the checks on arguments, and the composite path beside the kernels.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "../kernels.h"

namespace fastmlp {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;  // of input, weight and bias
using Mask = std::array<bool, 3>;                      // which of them are wanted

// The activation of that name; raises ValueError where there is none.
Activation parse_activation(std::string_view name);

// These raise RuntimeError, naming the argument and what was expected, where torch's own linear would raise one.
void check_same(std::string_view name, const Tensor& argument, const Tensor& input);  // device and dtype
void check_arguments(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);

// Null for a dense tensor that no transform is at work on, or the reason why no kernel may read it.
const char* why_not_plain(const Tensor& t);

// Null where the kernels cover these arguments, or the reason why they take the composite path.
const char* why_not_fused(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);

// The same for the backward pass. It reads input for the gradient of weight, weight for that of input, y for g'; what
// it does not read may be left out.
const char* why_not_fused_backward(const Tensor& grad_y, const OptionalTensor& input,
                                   const OptionalTensor& weight);

// The same results from torch's own differentiable operations: right for everything that torch covers.
Tensor linear_composite(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                        std::string_view activation);
Gradients linear_backward_composite(const Tensor& grad_y, const OptionalTensor& input,
                                    const OptionalTensor& weight, const OptionalTensor& y,
                                    std::string_view activation, Mask mask);

// The ops through the dispatcher, so that tracing sees them.
Tensor call_mlp(const Tensor& input, at::TensorList weights, at::TensorList biases,
                std::string_view activation);
Tensor call_train_step(const Tensor& input, const Tensor& target, at::TensorList params,
                       at::TensorList states, at::TensorList counts, const Tensor& workspace,
                       at::IntArrayRef has_bias, c10::List<std::string> activations, std::string_view loss,
                       bool mean, const OptionalTensor& weight, const OptionalTensor& pos_weight,
                       int64_t ignore_index, double label_smoothing, std::string_view optimizer,
                       at::ArrayRef<double> options, at::IntArrayRef trained);
Tensor call_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                   std::string_view activation);
Gradients call_linear_backward(const Tensor& grad_y, const OptionalTensor& input,
                               const OptionalTensor& weight, const OptionalTensor& y,
                               std::string_view activation, Mask mask);

}  // namespace fastmlp
