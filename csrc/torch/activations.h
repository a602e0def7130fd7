// The activations as torch's own operations compute them, in one table.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <string>
#include <string_view>

#include "../activation.h"

namespace fastmlp {

using Names = at::ArrayRef<std::string>;
using Numbers = at::ArrayRef<double>;

// A row of the table.
struct ActivationFormula {
  std::string_view name;
  Activation activation;
  size_t parameters;  // how many numbers it has
  Reads reads;
  at::Tensor (*forward)(const at::Tensor& z, Numbers parameters);
  at::Tensor (*backward)(const at::Tensor& grad_y, const at::Tensor& y_or_z, Numbers parameters);
};

extern const ActivationFormula formulas[];

// The activation of a layer: a row, and its numbers.
struct LayerActivation {
  const ActivationFormula* formula;
  Numbers parameters;

  bool reads_y() const { return formula->reads == Reads::y; }
  bool reads_z() const { return formula->reads == Reads::z; }
  at::Tensor forward(const at::Tensor& z) const { return formula->forward(z, parameters); }
  at::Tensor backward(const at::Tensor& grad_y, const at::Tensor& y_or_z) const {
    return formula->backward(grad_y, y_or_z, parameters);
  }
};
using LayerActivations = c10::SmallVector<LayerActivation, 4>;

// The activations of these names, which take as many of the parameters as they have, one after the other. Raises
// ValueError for an unknown name, or too few or too many parameters.
LayerActivations parse_activations(Names names, Numbers parameters);

}  // namespace fastmlp
