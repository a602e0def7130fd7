// The optimizers, in one place for both backends and for every kernel that holds a gradient: what one step makes of an
// element. The formulas are above Optimizer in kernels.h.
//
// V is float, or a vector of floats, as in activation.h.
#pragma once

#include "activation.h"

namespace fastmlp {

// The processor's own square root, rounded once, as division is.
FASTMLP_INLINE float square_root(float v) { return __builtin_sqrtf(v); }
template <class V>
FASTMLP_INLINE V square_root(V v) {
#ifdef FASTMLP_SQUARE_ROOT
  return V(FASTMLP_SQUARE_ROOT(v));
#else
  for (unsigned i = 0; i < sizeof(V) / sizeof(float); ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

template <class V>
FASTMLP_INLINE V larger_or_nan(V a, V b) {
  return (a != a) | (a > b) ? a : b;
}

// An optimizer and how many tensors of state each parameter has: what a kernel is instantiated for.
template <Optimizer::Kind kind_, int states_>
struct Rule {
  static constexpr Optimizer::Kind kind = kind_;
  static constexpr int states = states_;

  // w after the step, from w, its gradient g, and its state, which is changed.
  template <class V>
  static FASTMLP_INLINE V updated(V w, V g, V* state, const Optimizer& o, const Rates& r) {
    if (o.maximize) g = -g;
    if (o.weight_decay != 0) g = fused(V{} + o.weight_decay, w, g);  // 0 · inf would be NaN
    if constexpr (kind == Optimizer::sgd) {
      if constexpr (states > 0) {
        const V m = o.first ? g : fused(V{} + o.momentum, state[0], o.undamped * g);
        state[0] = m;
        g = o.nesterov ? fused(V{} + o.momentum, m, g) : m;
      }
      return fused(V{} - r.rate, g, w);
    } else {
      const V change = g - state[0];  // from the nearer end, as torch's lerp goes
      const V m =
          o.undamped < 0.5f ? fused(V{} + o.undamped, change, state[0]) : fused(V{} - o.momentum, change, g);
      const V v = fused(o.undamped_square * g, g, o.momentum_square * state[1]);
      state[0] = m, state[1] = v;
      V largest = v;
      if constexpr (states > 2) largest = state[2] = larger_or_nan(v, state[2]);
      const V size = fused(square_root(largest), V{} + r.inverse_root, o.eps);
      return fused(V{} - r.rate, m / size, o.kept * w);
    }
  }
};

// Calls f(Rule<kind, states>{}).
template <class F>
auto with_rule(const Optimizer& o, F f) {
  if (o.kind == Optimizer::adam)
    return o.states > 2 ? f(Rule<Optimizer::adam, 3>{}) : f(Rule<Optimizer::adam, 2>{});
  return o.states > 0 ? f(Rule<Optimizer::sgd, 1>{}) : f(Rule<Optimizer::sgd, 0>{});
}

}  // namespace fastmlp
