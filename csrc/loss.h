// The losses of one element at a time, in one place for both backends. The formulas are above Loss in kernels.h; those of
// the gradient:
//
//   mse               2 d
//   l1                sign d
//   smooth_l1         d / β, or sign d
//   huber             d, or δ sign d
//   bce_with_logits   w (q / (1 + e^-y) - p t)     the loss is w ((1 - t) y + q (log(1 + e^-|y|) + max(-y, 0)))
//
// with q = 1 + (p - 1) t. As in torch the sign of NaN is 0, and the gradient of the others NaN.
//
// V is float, or a vector of floats, as in activation.h.
#pragma once

#include "activation.h"

namespace fastmlp {

// The loss of an output y, and as `slope` its gradient.
template <Loss kind, class V>
FASTMLP_INLINE V loss_of_element(V y, V target, V weight, V pos_weight, float bound, V& slope) {
  const V one = V{} + 1.0f;
  if constexpr (kind == Loss::bce_with_logits) {
    const V e = exponential(y < 0.0f ? y : -y), larger = 1.0f / (1.0f + e);
    const V q = fused(pos_weight - 1.0f, target, 1.0f);
    slope = weight * fused(q, y < 0.0f ? e * larger : larger, -(pos_weight * target));
    return weight * fused(1.0f - target, y, q * (log_of_1_and(e) + (y < 0.0f ? -y : V{})));
  } else {
    const V d = y - target, size = d < 0.0f ? -d : d, sign = d < 0.0f ? -one : d > 0.0f ? one : V{};
    if constexpr (kind == Loss::mse) {
      slope = d + d;
      return d * d;
    } else if constexpr (kind == Loss::smooth_l1) {
      slope = size >= bound ? sign : d / bound;
      return size < bound ? 0.5f * d * d / bound : size - 0.5f * bound;
    } else if constexpr (kind == Loss::huber) {
      slope = size >= bound ? bound * sign : d;
      return size <= bound ? 0.5f * d * d : bound * (size - 0.5f * bound);
    } else {
      slope = sign;
      return size;
    }
  }
}

// Calls f(LossConstant<loss>{}) with a loss of elements as a constant.
template <Loss loss>
using LossConstant = std::integral_constant<Loss, loss>;
template <class F>
FASTMLP_INLINE auto with_loss(Loss loss, F f) {
  switch (loss) {
    case Loss::mse:
      return f(LossConstant<Loss::mse>{});
    case Loss::l1:
      return f(LossConstant<Loss::l1>{});
    case Loss::smooth_l1:
      return f(LossConstant<Loss::smooth_l1>{});
    case Loss::huber:
      return f(LossConstant<Loss::huber>{});
    default:
      return f(LossConstant<Loss::bce_with_logits>{});
  }
}

}  // namespace fastmlp
