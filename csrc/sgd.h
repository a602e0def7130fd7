// One step of stochastic gradient descent, in one place for both backends and for every kernel that holds a
// gradient: see Sgd in kernels.h for the formula.
//
// V is float, or a vector of floats, as in activation.h.
#pragma once

#include "activation.h"

namespace fastmlp {

// w after the step, from w and its gradient g; *momentum is m before, and m after. Null where there is none.
template <class V>
FASTMLP_INLINE V updated(V w, V g, V* momentum, const Sgd& s) {
  if (s.maximize) g = -g;
  if (s.weight_decay != 0) g = fused(V{} + s.weight_decay, w, g);  // 0 · inf would be NaN
  if (momentum) {
    const V m = s.first ? g : fused(V{} + s.momentum, *momentum, s.undamped * g);
    *momentum = m;
    g = s.nesterov ? fused(V{} + s.momentum, m, g) : m;
  }
  return fused(V{} - s.lr, g, w);
}

}  // namespace fastmlp
