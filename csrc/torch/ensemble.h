// The networks of an ensemble's models, which are of equal shapes.
#pragma once

#include <deque>
#include <vector>

#include "chain.h"

namespace fastmlp {

class Networks {
 public:
  // False where the models are not chains of layers, which differ in their parameters' values alone and have those on the
  // CPU, or where somebody looks on. `known` is what layers.py knows.
  bool find(PyObject* known, PyObject* models, const Tensor& input);

  // Whether the input is one for all, [batch, K], or one for each, [networks, batch, K].
  bool takes(const Tensor& input) const;

  // A layer's, of one of the networks; undefined for no bias.
  const Tensor& weight(size_t n, size_t i) const { return weights[n * layers + i]; }
  const Tensor& bias(size_t n, size_t i) const { return biases[n * layers + i]; }

  size_t count, layers;  // of networks, and of each network's layers
  int64_t K, N;          // in_features and out_features
  std::vector<Chain> chains;
  std::vector<Tensor> weights, biases;  // network by network
  std::optional<NamedActivations> named;
  LayerActivations activations;
};

// Shared by all networks, or with one for each in its first dimension: where each finds its own.
struct PerNetwork {
  explicit PerNetwork(const Tensor& t, int64_t dimensions)  // of a network's own
      : data(static_cast<const char*>(t.const_data_ptr())),
        stride(t.dim() > dimensions ? t.stride(0) * int64_t(t.element_size()) : 0) {}
  const void* operator[](size_t n) const { return data + int64_t(n) * stride; }

  const char* data;
  int64_t stride;  // in bytes
};

}  // namespace fastmlp
