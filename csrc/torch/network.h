// The arguments of the ops network, network_forward and network_backward, each list taken apart once a call.
#pragma once

#include <algorithm>

#include "activations.h"
#include "ops.h"

namespace fastmlp {

using at::TensorList;

// A list as it is read: of an OptionalTensors each look makes a new reference.
using Tensors = c10::SmallVector<OptionalTensor, 4>;
inline Tensors read(const OptionalTensors& list) {
  Tensors tensors;
  for (size_t i = 0; i < list.size(); ++i) tensors.push_back(list.get(i));
  return tensors;
}

// Those of network and network_forward.
struct Network {
  Network(const Tensor& input, TensorList weights, const OptionalTensors& bias_list, Names names,
          Numbers parameters)
      : input(input),
        weights(weights),
        bias_list(bias_list),
        names(names),
        parameters(parameters),
        size(weights.size()),
        biases(read(bias_list)),
        activations(parse_activations(names, parameters)) {
    TORCH_CHECK(size > 0, "weights: expected one for each layer, got none");
    TORCH_CHECK(biases.size() == size, "biases: expected ", size, ", as many as weights, got ",
                biases.size());
    TORCH_CHECK(names.size() == size, "activations: expected ", size, ", as many as weights, got ",
                names.size());
  }
  // Whether the layer leaves a tensor beside y.
  bool leaves(size_t i) const { return i + 1 < size || activations[i].reads_z(); }

  const Tensor& input;
  TensorList weights;
  const OptionalTensors& bias_list;
  Names names;
  Numbers parameters;
  size_t size;
  Tensors biases;
  LayerActivations activations;
};

// Those of network_backward. Gradients are numbered as the arguments of network are: input, the weights, the biases.
struct Backpropagation {
  Backpropagation(const Tensor& grad_y, const OptionalTensor& input, const OptionalTensors& weight_list,
                  const OptionalTensors& saved_list, Names names, Numbers parameters, at::IntArrayRef wanted)
      : grad_y(grad_y),
        input(input),
        weight_list(weight_list),
        saved_list(saved_list),
        names(names),
        parameters(parameters),
        wanted(wanted),
        size(names.size()),
        lowest(size),
        weights(read(weight_list)),
        saved(read(saved_list)),
        activations(parse_activations(names, parameters)),
        is_wanted(1 + 2 * size) {
    TORCH_CHECK(weights.size() == size && saved.size() == size, "weights, saved: expected ", size,
                " of each, as many as activations, got ", weights.size(), " and ", saved.size());
    for (const int64_t number : wanted) {
      TORCH_CHECK(0 <= number && size_t(number) < is_wanted.size() && size > 0,
                  "wanted: expected numbers of arguments, got ", number);
      is_wanted[number] = true;
      lowest = std::min(lowest, number ? size_t(number - 1) % size : 0);
    }
  }
  bool wants_x(size_t i) const { return i > lowest || (i == 0 && is_wanted[0]); }
  bool wants_weight(size_t i) const { return is_wanted[1 + i]; }
  bool wants_bias(size_t i) const { return is_wanted[1 + size + i]; }
  // What layer i has computed from, or what the layer below has left of it.
  const OptionalTensor& x(size_t i) const { return i ? saved[i - 1] : input; }

  std::vector<Tensor> only_wanted(TensorList grads) const {
    std::vector<Tensor> result;
    result.reserve(wanted.size());
    for (const int64_t number : wanted) result.push_back(grads[number]);
    return result;
  }

  const Tensor& grad_y;
  const OptionalTensor& input;
  const OptionalTensors &weight_list, &saved_list;
  Names names;
  Numbers parameters;
  at::IntArrayRef wanted;
  size_t size, lowest;  // the lowest layer that anything is asked of; size for none
  Tensors weights, saved;
  LayerActivations activations;
  c10::SmallVector<bool, 16> is_wanted;
};

// Raise RuntimeError where the arguments do not fit together, as torch's own linear would, and name the argument.
void check(const Network&);
void check(const Backpropagation&);

// Null where the kernels cover the arguments, or the reason why they take the composite path.
const char* why_not_fused(const Network&);
const char* why_not_fused(const Backpropagation&);
const char* why_not_multiplied(const Tensor&);  // by its dtype and device

// Each layer by itself, on the path that it can take.
Tensor network_by_layers(const Network&);

// The gradients by torch's own operations; or from those of all outputs of network_forward, undefined ones for zero.
std::vector<Tensor> network_backward_composite(const Backpropagation&);
std::vector<Tensor> run_composite(const Backpropagation&, TensorList grad_outputs);

// A function of the arguments taken together, as the dispatcher calls it.
template <auto function>
auto forward_op(const Tensor& input, TensorList weights, const OptionalTensors& biases, Names activations,
                Numbers parameters) {
  return function({input, weights, biases, activations, parameters});
}
template <auto function>
auto backward_op(const Tensor& grad_y, const OptionalTensor& input, const OptionalTensors& weights,
                 const OptionalTensors& saved, Names activations, Numbers parameters,
                 at::IntArrayRef wanted) {
  return function({grad_y, input, weights, saved, activations, parameters, wanted});
}

}  // namespace fastmlp
