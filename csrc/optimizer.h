// The optimizers, in one place for both backends and for every kernel that holds a gradient: what one step makes of an
// element. The formulas are above Optimizer and Clip in kernels.h.
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

// A row of the table: what a kernel is instantiated for, with the numbers of one tensor's step. It gives w after the step,
// from w, its gradient g, and its `states`, which are changed; they are not read in the first step of an Sgd.
template <int states_>
struct Sgd {
  static constexpr int states = states_;
  FASTMLP_INLINE Sgd(const Optimizer& o, const Rates& r)
      : rate(r.rate),
        weight_decay(o.weight_decay),
        momentum(o.momentum),
        undamped(o.undamped),
        maximize(o.maximize),
        nesterov(o.nesterov),
        first(o.first) {}

  template <class V>
  FASTMLP_INLINE V operator()(V w, V g, V* state) const {
    if (maximize) g = -g;
    if (weight_decay != 0) g = fused(V{} + weight_decay, w, g);  // 0 · inf would be NaN
    if constexpr (states > 0) {
      const V m = first ? g : fused(V{} + momentum, state[0], undamped * g);
      state[0] = m;
      g = nesterov ? fused(V{} + momentum, m, g) : m;
    }
    return fused(V{} - rate, g, w);
  }

  float rate, weight_decay, momentum, undamped;
  bool maximize, nesterov, first;
};

template <int states_>
struct Adam {
  static constexpr int states = states_;
  static constexpr bool first = false;
  FASTMLP_INLINE Adam(const Optimizer& o, const Rates& r)
      : rate(r.rate),
        inverse_root(r.inverse_root),
        weight_decay(o.weight_decay),
        momentum(o.momentum),
        undamped(o.undamped),
        momentum_square(o.momentum_square),
        undamped_square(o.undamped_square),
        eps(o.eps),
        kept(o.kept),
        maximize(o.maximize) {}

  template <class V>
  FASTMLP_INLINE V operator()(V w, V g, V* state) const {
    if (maximize) g = -g;
    if (weight_decay != 0) g = fused(V{} + weight_decay, w, g);
    const V change = g - state[0];  // from the nearer end, as torch's lerp goes
    const V m = undamped < 0.5f ? fused(V{} + undamped, change, state[0]) : fused(V{} - momentum, change, g);
    const V v = fused(undamped_square * g, g, momentum_square * state[1]);
    state[0] = m, state[1] = v;
    V largest = v;
    if constexpr (states > 2) largest = state[2] = larger_or_nan(v, state[2]);
    const V size = fused(square_root(largest), V{} + inverse_root, eps);
    return fused(V{} - rate, m / size, kept * w);
  }

  float rate, inverse_root, weight_decay, momentum, undamped, momentum_square, undamped_square, eps, kept;
  bool maximize;
};

// What clipping multiplies the gradients by. Whether the norm is finite is asked of it as it is stored.
FASTMLP_INLINE float factor_of(const Clip& c, double norm, bool is_finite) {
  const double factor = c.only_finite && !is_finite ? 1 : c.max_norm / (norm + 1e-6);
  return factor >= 1 ? 1.0f : float(factor);  // NaN is not
}

// Calls f(Named<row>{}), which makes the row of the Optimizer and of each tensor's Rates.
template <class Row>
struct Named {
  using type = Row;
};
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // f is of the host or of the device, as its caller is
#endif
template <class F>
FASTMLP_INLINE auto with_rule(const Optimizer& o, F f) {
  if (o.kind == Optimizer::adam) return o.states > 2 ? f(Named<Adam<3>>{}) : f(Named<Adam<2>>{});
  return o.states > 0 ? f(Named<Sgd<1>>{}) : f(Named<Sgd<0>>{});
}

}  // namespace fastmlp
