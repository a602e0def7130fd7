// One step of an optimizer for a range of a tensor's elements, on one thread. Bound by bandwidth: w, its gradient and
// its state are read once, w and its state written once.

// The first n elements, or a whole register where there are more.
template <class Row, class T>
FASTMLP_INLINE void update_some(const Row& row, T* param, const T* grad, T* const* states, int64_t at,
                                int64_t n) {
  V state[most_states]{};
  for (int s = 0; s < Row::states && !row.first; ++s) state[s] = load(states[s] + at, n);
  const V w = row(load(param + at, n), load(grad, n), state);
  for (int s = 0; s < Row::states; ++s) store(states[s] + at, state[s], n);
  store(param + at, w, n);
}

// `rows` rows of n elements, ld apart and in the gradient ldg; the first begins at `at`.
template <class Row, class T>
void update(const Row row, const Update& u, int64_t at, const T* grad, int64_t rows, int64_t n, int64_t ld,
            int64_t ldg) {
  T* const param = static_cast<T*>(u.param) + at;
  T* states[most_states];
  for (int s = 0; s < Row::states; ++s) states[s] = static_cast<T*>(u.states[s]) + at;
  for (int64_t r = 0; r < rows; ++r, grad += ldg) {
    int64_t i = 0;
    // Whole registers apart: the loop is then short enough for the compiler to take its conditions out.
    for (; i + width <= n; i += width) update_some(row, param, grad + i, states, r * ld + i, width);
    if (i < n) update_some(row, param, grad + i, states, r * ld + i, n - i);
  }
}

template <class T>
void update(const Optimizer& o, const Update& u, Range range) {
  const T* const grad = static_cast<const T*>(u.grad) + range.begin;
  with_rule(o, [&](auto named) {
    const typename decltype(named)::type row(o, u.rates);
    update(row, u, range.begin, grad, 1, range.size(), 0, 0);
  });
}

void update(const Optimizer& o, const Update& u, Range range) {
  if (o.dtype == Dtype::float32) update<float>(o, u, range);
  else update<bfloat16>(o, u, range);
}

// A float32 parameter and its state, changed by m rows and n columns of its gradient; the first row begins at `at`.
void descend(const Optimizer& o, const Update& u, int64_t at, int64_t ld, const float* grad, int64_t ldg,
             int64_t m, int64_t n) {
  with_rule(o, [&](auto named) {
    const typename decltype(named)::type row(o, u.rates);
    update(row, u, at, grad, m, n, ld, ldg);
  });
}
