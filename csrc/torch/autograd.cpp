// Autograd: one node for a fused layer, whose backward calls the dispatched op again: tracing then sees it.
//
// Higher derivatives need no code of their own: where a gradient is itself to be differentiated, the autograd
// kernel of linear_backward is the composite formula.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "linear.h"

namespace fastmlp {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const std::optional<Tensor>& bias, std::string_view activation) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    Tensor y = call_linear(input, weight, bias, activation);
    // g' is a function of y; the identity's needs none, and the layer then keeps no more than torch's own.
    ctx->save_for_backward({input, weight, activation == "identity" ? Tensor() : y});
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["has_bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_y) {
    const variable_list saved = ctx->get_saved_variables();
    const auto y = saved[2].defined() ? std::optional<Tensor>(saved[2]) : std::nullopt;
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    const Mask mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                       has_bias && ctx->needs_input_grad(2)};
    auto [grad_input, grad_weight, grad_bias] = call_linear_backward(
        grad_y[0], saved[0], saved[1], y, ctx->saved_data["activation"].toStringRef(), mask);
    return {grad_input, grad_weight, grad_bias, Tensor()};
  }
};

bool needs_grad(const Tensor& t) { return t.requires_grad(); }
bool needs_grad(const std::optional<Tensor>& t) { return t && t->requires_grad(); }

template <class... Arguments>
bool is_differentiated(const Arguments&... arguments) {
  return at::GradMode::is_enabled() && (needs_grad(arguments) || ...);
}

Tensor linear_autograd(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       std::string_view activation) {
  if (why_not_fused(input, weight, bias)) return linear_composite(input, weight, bias, activation);
  if (is_differentiated(input, weight, bias)) return LinearFunction::apply(input, weight, bias, activation);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_linear(input, weight, bias, activation);
}

Gradients linear_backward_autograd(const Tensor& grad_y, const Tensor& input, const Tensor& weight,
                                   const std::optional<Tensor>& y, std::string_view activation, Mask mask) {
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
