// One step of an optimizer for a range of a tensor's elements, on one thread. Bound by bandwidth: w, its gradient and
// its state are read once, w and its state written once.

// The first n elements, or a whole register where there are more.
template <class Rule, class T>
FASTMLP_INLINE void update_some(const Optimizer& o, const Update& u, int64_t i, int64_t n) {
  T* const param = static_cast<T*>(u.param) + i;
  V state[most_states]{};
  for (int s = 0; s < Rule::states && !o.first; ++s) state[s] = load(static_cast<T*>(u.states[s]) + i, n);
  const V w = Rule::updated(load(param, n), load(static_cast<const T*>(u.grad) + i, n), state, o, u.rates);
  for (int s = 0; s < Rule::states; ++s) store(static_cast<T*>(u.states[s]) + i, state[s], n);
  store(param, w, n);
}

template <class Rule, class T>
void update(const Optimizer o, const Update u, Range range) {
  int64_t i = range.begin;
  // Whole registers apart: the loop is then short enough for the compiler to take its conditions out.
  for (; i + width <= range.end; i += width) update_some<Rule, T>(o, u, i, width);
  if (i < range.end) update_some<Rule, T>(o, u, i, range.end - i);
}

void update(const Optimizer& o, const Update& u, Range range) {
  with_rule(o, [&](auto rule) {
    if (o.dtype == Dtype::float32) update<decltype(rule), float>(o, u, range);
    else update<decltype(rule), bfloat16>(o, u, range);
  });
}

// The part of an update that begins so many elements later.
inline Update offset(Update u, int64_t elements) {
  u.param = static_cast<float*>(u.param) + elements;
  for (void*& state : u.states)
    if (state) state = static_cast<float*>(state) + elements;
  return u;
}

// A float32 parameter and its state, changed by m rows and n columns of its gradient.
void descend(const Optimizer& o, Update u, const float* grad, int64_t ld, int64_t ldw, int64_t m, int64_t n) {
  with_rule(o, [&](auto rule) {
    for (int64_t i = 0; i < m; ++i, grad += ld, u = offset(u, ldw)) {
      u.grad = grad;
      update<decltype(rule), float>(o, u, {0, n});
    }
  });
}
