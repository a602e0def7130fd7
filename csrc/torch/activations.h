// The activations as torch's own operations compute them, in one table. The kernels' table is ../activation.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <string>
#include <string_view>
#include <vector>

#include "../activation.h"

namespace fastmlp {

using Names = at::ArrayRef<std::string>;
using Numbers = at::ArrayRef<double>;

// A row of the table.
struct ActivationFormula {
  std::string_view name;
  std::vector<double> defaults;  // of its parameters
  Activation (*kernel)(Numbers parameters);
  at::Tensor (*forward)(const at::Tensor& z, Numbers parameters);
  at::Tensor (*backward)(const at::Tensor& grad_y, const at::Tensor& y_or_z, Numbers parameters);
};

extern const std::vector<ActivationFormula> formulas;

// The activation of a layer.
struct LayerActivation {
  const ActivationFormula* formula;
  Numbers parameters;
  Activation kernel;  // as the kernels know it
  Reads reads;        // what backward reads

  bool reads_z() const { return reads == Reads::z; }
  at::Tensor forward(const at::Tensor& z) const { return formula->forward(z, parameters); }
  at::Tensor backward(const at::Tensor& grad_y, const at::Tensor& y_or_z) const {
    return formula->backward(grad_y, y_or_z, parameters);
  }
  // The kernels' for a dtype: bounds are numbers of it, as torch has them.
  Activation kernel_for(at::ScalarType dtype) const;
};
using LayerActivations = c10::SmallVector<LayerActivation, 4>;

// The activations of these names, which take as many of the parameters as they have, one after the other. Raises
// ValueError for an unknown name, or too few or too many parameters.
LayerActivations parse_activations(Names names, Numbers parameters);

// One activation, as the kernels know it for a dtype: with the parameters given, or where there are none its defaults. Raises
// ValueError as above.
Activation kernel_for(at::ScalarType dtype, std::string_view name, Numbers given);

// The parameters of one activation: those given, or where there are none its defaults. Raises ValueError as above.
Numbers parameters_of(std::string_view name, Numbers given);

}  // namespace fastmlp
