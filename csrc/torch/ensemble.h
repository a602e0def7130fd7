// The networks of an ensemble's models.
#pragma once

#include "chain.h"
#include "network.h"
#include "together.h"

namespace fastmlp {

class Networks {
 public:
  // False where the models are not chains of layers with the same activations and biases, or are not for the kernels of the
  // CPU to compute with nobody who sees it; or where the input is not one for all, [batch, K], nor one for each, [models,
  // batch, K]. `known` is what layers.py knows.
  bool find(PyObject* known, PyObject* models, const Tensor& input);
  Network operator[](size_t n) const {
    return {xs[n], at::TensorList(weights).slice(n * layers, layers), biases[n], named->names,
            named->parameters};
  }

  size_t count, layers;  // of networks, and of each network's layers
  bool requires_grad;    // whether any of them, or the input, does
  std::vector<Chain> chains;
  std::vector<Tensor> xs, weights;  // an input and the weights of each network
  std::vector<OptionalTensors> biases;
  std::optional<NamedActivations> named;
};

// Their outputs, by one autograd node.
std::vector<Tensor> call_networks(const Networks& networks);

}  // namespace fastmlp
