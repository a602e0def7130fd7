#include "activations.h"

#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>

namespace fastmlp {

using at::Tensor;

const ActivationFormula formulas[] = {
    {"identity",
     {Activation::identity},
     0,
     Reads::nothing,  //
     [](const Tensor& z, Numbers) { return z; },
     [](const Tensor& grad_y, const Tensor&, Numbers) { return grad_y; }},
    {"relu",
     {Activation::relu},
     0,
     Reads::y,  //
     [](const Tensor& z, Numbers) { return at::relu(z); },
     [](const Tensor& grad_y, const Tensor& y, Numbers) { return at::threshold_backward(grad_y, y, 0); }},
    {"sigmoid",
     {Activation::sigmoid},
     0,
     Reads::y,  //
     [](const Tensor& z, Numbers) { return at::sigmoid(z); },
     [](const Tensor& grad_y, const Tensor& y, Numbers) { return at::sigmoid_backward(grad_y, y); }},
    {"tanh",
     {Activation::tanh},
     0,
     Reads::y,  //
     [](const Tensor& z, Numbers) { return at::tanh(z); },
     [](const Tensor& grad_y, const Tensor& y, Numbers) { return at::tanh_backward(grad_y, y); }},
};

namespace {

const ActivationFormula& formula_of(std::string_view name) {
  std::string known;
  for (const ActivationFormula& formula : formulas)
    if (formula.name == name) return formula;
  for (const ActivationFormula& formula : formulas)
    known += (known.empty() ? "'" : ", '") + std::string(formula.name) + "'";
  TORCH_CHECK_VALUE(false, "activation: expected ", known, ", got '", name, "'");
}

}  // namespace

LayerActivations parse_activations(Names names, Numbers parameters) {
  LayerActivations activations;
  for (const std::string& name : names) {
    const ActivationFormula& formula = formula_of(name);
    TORCH_CHECK_VALUE(parameters.size() >= formula.parameters, "parameters: expected ", formula.parameters,
                      " for '", name, "', got ", parameters.size());
    activations.push_back({&formula, parameters.slice(0, formula.parameters)});
    parameters = parameters.slice(formula.parameters);
  }
  TORCH_CHECK_VALUE(parameters.empty(), "parameters: expected no more than the activations have, got ",
                    parameters.size(), " more");
  return activations;
}

}  // namespace fastmlp
