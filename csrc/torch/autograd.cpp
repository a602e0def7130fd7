// Autograd: one node for a fused layer, whose backward calls the dispatched op again: tracing then sees it.
//
// Higher derivatives need no code of their own: where a gradient is itself to be differentiated, the autograd
// kernel of linear_backward is the composite formula.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "linear.h"
#include "saved.h"

namespace fastmlp {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const OptionalTensor& bias, std::string_view activation) {
    SavedLayers layers{{0}, bias.has_value()};
    if (weight.requires_grad()) layers.what[0] |= saves_x;
    if (input.requires_grad()) layers.what[0] |= saves_weight;
    if (activation != "identity") layers.what[0] |= saves_y;
    const Tensor saved_weight = input.requires_grad() ? layers.oriented(weight) : Tensor();
    const at::AutoDispatchBelowADInplaceOrView guard;
    Tensor y = call_linear(input, weight, bias, activation);
    variable_list saved;
    layers.each([&](size_t, Saved what) {
      saved.push_back(what == saves_x ? input : what == saves_weight ? saved_weight : y);
    });
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["layers"] = layers.packed();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_y) {
    const variable_list saved = ctx->get_saved_variables();
    const SavedLayers layers = SavedLayers::unpacked(ctx->saved_data["layers"]);
    OptionalTensor input, weight, y;
    size_t next = 0;
    layers.each([&](size_t, Saved what) {
      const Tensor& t = saved[next++];
      (what == saves_x        ? input
       : what == saves_weight ? weight
                              : y) = what == saves_weight ? layers.restored(t) : t;
    });
    const Mask mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                       layers.has_bias && ctx->needs_input_grad(2)};
    auto [grad_input, grad_weight, grad_bias] =
        call_linear_backward(grad_y[0], input, weight, y, ctx->saved_data["activation"].toStringRef(), mask);
    return {grad_input, grad_weight, grad_bias, Tensor()};
  }
};

bool needs_grad(const Tensor& t) { return t.requires_grad(); }
bool needs_grad(const OptionalTensor& t) { return t && t->requires_grad(); }

template <class... Arguments>
bool is_differentiated(const Arguments&... arguments) {
  return at::GradMode::is_enabled() && (needs_grad(arguments) || ...);
}

Tensor linear_autograd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                       std::string_view activation) {
  if (why_not_fused(input, weight, bias)) return linear_composite(input, weight, bias, activation);
  if (is_differentiated(input, weight, bias)) return LinearFunction::apply(input, weight, bias, activation);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_linear(input, weight, bias, activation);
}

Gradients linear_backward_autograd(const Tensor& grad_y, const OptionalTensor& input,
                                   const OptionalTensor& weight, const OptionalTensor& y,
                                   std::string_view activation, Mask mask) {
  if (is_differentiated(grad_y, input, weight, y))
    return linear_backward_composite(grad_y, input, weight, y, activation, mask);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_linear_backward(grad_y, input, weight, y, activation, mask);
}

}  // namespace
}  // namespace fastmlp

TORCH_LIBRARY_IMPL(fastmlp, Autograd, m) {
  m.impl("linear", fastmlp::linear_autograd);
  m.impl("linear_backward", fastmlp::linear_backward_autograd);
}
