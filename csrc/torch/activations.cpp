#include "activations.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/celu.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/elu_backward.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/hardsigmoid.h>
#include <ATen/ops/hardsigmoid_backward.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardswish_backward.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/hardtanh_backward.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/mish.h>
#include <ATen/ops/mish_backward.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/relu6.h>
#include <ATen/ops/selu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/softplus_backward.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

namespace fastmlp {
namespace {

using at::Tensor;

constexpr double selu_alpha = 1.6732632423543772, selu_scale = 1.0507009873554805;

template <Activation::Kind kind>
Activation as_given(Numbers p) {
  Activation g{kind};
  std::copy(p.begin(), p.end(), g.parameters);
  return g;
}

}  // namespace

// clang-format off
const std::vector<ActivationFormula> formulas = {
    {"identity", {}, as_given<Activation::identity>,
     [](const Tensor& z, Numbers) { return z; },
     [](const Tensor& grad, const Tensor&, Numbers) { return grad; }},
    {"relu", {}, as_given<Activation::relu>,
     [](const Tensor& z, Numbers) { return at::relu(z); },
     [](const Tensor& grad, const Tensor& y, Numbers) { return at::threshold_backward(grad, y, 0); }},
    {"leaky_relu", {0.01}, as_given<Activation::leaky_relu>,
     [](const Tensor& z, Numbers p) { return at::leaky_relu(z, p[0]); },
     [](const Tensor& grad, const Tensor& y_or_z, Numbers p) { return at::leaky_relu_backward(grad, y_or_z, p[0], false); }},
    {"relu6", {}, [](Numbers) { return Activation{Activation::hardtanh, {0, 6}}; },
     [](const Tensor& z, Numbers) { return at::relu6(z); },
     [](const Tensor& grad, const Tensor& y, Numbers) { return at::hardtanh_backward(grad, y, 0, 6); }},
    {"hardtanh", {-1, 1}, as_given<Activation::hardtanh>,
     [](const Tensor& z, Numbers p) { return at::hardtanh(z, p[0], p[1]); },
     [](const Tensor& grad, const Tensor& y, Numbers p) { return at::hardtanh_backward(grad, y, p[0], p[1]); }},
    {"elu", {1}, [](Numbers p) { return Activation{Activation::elu, {float(p[0]), 1, 1}}; },
     [](const Tensor& z, Numbers p) { return at::elu(z, p[0]); },
     [](const Tensor& grad, const Tensor& z, Numbers p) { return at::elu_backward(grad, p[0], 1, 1, false, z); }},
    {"celu", {1}, [](Numbers p) {
       TORCH_CHECK(p[0] != 0, "ZeroDivisionError: alpha cannot be 0 for CELU");
       return Activation{Activation::elu, {float(p[0]), 1, float(1 / p[0])}};
     },
     [](const Tensor& z, Numbers p) { return at::celu(z, p[0]); },
     [](const Tensor& grad, const Tensor& z, Numbers p) { return at::elu_backward(grad, p[0], 1, 1 / p[0], false, z); }},
    {"selu", {}, [](Numbers) { return Activation{Activation::elu, {float(selu_alpha), float(selu_scale), 1}}; },
     [](const Tensor& z, Numbers) { return at::selu(z); },
     [](const Tensor& grad, const Tensor& z, Numbers) { return at::elu_backward(grad, selu_alpha, selu_scale, 1, false, z); }},
    {"sigmoid", {}, as_given<Activation::sigmoid>,
     [](const Tensor& z, Numbers) { return at::sigmoid(z); },
     [](const Tensor& grad, const Tensor& y, Numbers) { return at::sigmoid_backward(grad, y); }},
    {"tanh", {}, as_given<Activation::tanh>,
     [](const Tensor& z, Numbers) { return at::tanh(z); },
     [](const Tensor& grad, const Tensor& y, Numbers) { return at::tanh_backward(grad, y); }},
    {"softplus", {1, 20}, as_given<Activation::softplus>,
     [](const Tensor& z, Numbers p) { return at::softplus(z, p[0], p[1]); },
     [](const Tensor& grad, const Tensor& z, Numbers p) { return at::softplus_backward(grad, z, p[0], p[1]); }},
    {"silu", {}, as_given<Activation::silu>,
     [](const Tensor& z, Numbers) { return at::silu(z); },
     [](const Tensor& grad, const Tensor& z, Numbers) {
       if (!at::GradMode::is_enabled()) return at::silu_backward(grad, z);  // which has no derivative
       const Tensor s = at::sigmoid(z);
       return grad * s * (1 + z * (1 - s));
     }},
    {"gelu", {}, as_given<Activation::gelu>,
     [](const Tensor& z, Numbers) { return at::gelu(z, "none"); },
     [](const Tensor& grad, const Tensor& z, Numbers) { return at::gelu_backward(grad, z, "none"); }},
    {"gelu_tanh", {}, as_given<Activation::gelu_tanh>,
     [](const Tensor& z, Numbers) { return at::gelu(z, "tanh"); },
     [](const Tensor& grad, const Tensor& z, Numbers) { return at::gelu_backward(grad, z, "tanh"); }},
    {"mish", {}, as_given<Activation::mish>,
     [](const Tensor& z, Numbers) { return at::mish(z); },
     [](const Tensor& grad, const Tensor& z, Numbers) {
       if (!at::GradMode::is_enabled()) return at::mish_backward(grad, z);
       const Tensor t = at::tanh(at::softplus(z));
       return grad * (t + z * at::sigmoid(z) * (1 - t * t));
     }},
    {"hardswish", {}, as_given<Activation::hardswish>,
     [](const Tensor& z, Numbers) { return at::hardswish(z); },
     [](const Tensor& grad, const Tensor& z, Numbers) { return at::hardswish_backward(grad, z); }},
    {"hardsigmoid", {}, as_given<Activation::hardsigmoid>,
     [](const Tensor& z, Numbers) { return at::hardsigmoid(z); },
     [](const Tensor& grad, const Tensor& z, Numbers) { return at::hardsigmoid_backward(grad, z); }},
};
// clang-format on

namespace {

const ActivationFormula& formula_of(std::string_view name) {
  for (const ActivationFormula& formula : formulas)
    if (formula.name == name) return formula;
  std::string known;
  for (const ActivationFormula& formula : formulas)
    known += (known.empty() ? "'" : ", '") + std::string(formula.name) + "'";
  TORCH_CHECK_VALUE(false, "activation: expected ", known, ", got '", name, "'");
}

Numbers parameters_of(const ActivationFormula& formula, Numbers given) {
  if (given.empty()) return formula.defaults;
  TORCH_CHECK_VALUE(given.size() == formula.defaults.size(), "activation: expected ", formula.defaults.size(),
                    " parameters for '", formula.name, "', got ", given.size());
  return given;
}

// Bounds are numbers of the dtype.
Activation rounded(Activation g, at::ScalarType dtype) {
  if (g == Activation::hardtanh)
    for (float& bound : g.parameters)
      bound = dtype == at::kBFloat16 ? float(c10::BFloat16(bound))
              : dtype == at::kHalf   ? float(c10::Half(bound))
                                     : bound;
  return g;
}

}  // namespace

Activation LayerActivation::kernel_for(at::ScalarType dtype) const { return rounded(kernel, dtype); }

Activation kernel_for(at::ScalarType dtype, std::string_view name, Numbers given) {
  const ActivationFormula& formula = formula_of(name);
  return rounded(formula.kernel(parameters_of(formula, given)), dtype);
}

LayerActivations parse_activations(Names names, Numbers parameters) {
  LayerActivations activations;
  for (const std::string& name : names) {
    const ActivationFormula& formula = formula_of(name);
    const size_t count = formula.defaults.size();
    TORCH_CHECK_VALUE(parameters.size() >= count, "parameters: expected ", count, " for '", name, "', got ",
                      parameters.size());
    const Numbers own = parameters.slice(0, count);
    const Activation kernel = formula.kernel(own);
    activations.push_back({&formula, own, kernel, reads(kernel)});
    parameters = parameters.slice(count);
  }
  TORCH_CHECK_VALUE(parameters.empty(), "parameters: expected as many as the activations have, got ",
                    parameters.size(), " more");
  return activations;
}

Numbers parameters_of(std::string_view name, Numbers given) { return parameters_of(formula_of(name), given); }

}  // namespace fastmlp
