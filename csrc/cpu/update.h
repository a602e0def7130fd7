// One step of gradient descent for a range of a tensor's elements, on one thread. Bound by bandwidth: w, its
// gradient and its momentum are read once, w and the momentum written once.

// The first n elements, or a whole register where there are more.
template <bool has_momentum, class T>
FASTMLP_INLINE void update_some(const Sgd& s, T* param, const T* grad, T* momentum, int64_t n) {
  V m{};
  if (has_momentum && !s.first) m = load(momentum, n);
  const V w = updated(load(param, n), load(grad, n), has_momentum ? &m : nullptr, s);
  if (has_momentum) store(momentum, m, n);
  store(param, w, n);
}

template <bool has_momentum, class T>
void update(const Sgd s, T* param, const T* grad, T* momentum, Range range) {
  int64_t i = range.begin;
  // Whole registers apart: the loop is then short enough for the compiler to take its conditions out.
  for (; i + width <= range.end; i += width)
    update_some<has_momentum>(s, param + i, grad + i, momentum + i, width);
  if (i < range.end) update_some<has_momentum>(s, param + i, grad + i, momentum + i, range.end - i);
}

template <class T>
void update(const Sgd& s, const Update& u, Range range) {
  T* const param = static_cast<T*>(u.param);
  T* const momentum = static_cast<T*>(u.momentum);
  const T* const grad = static_cast<const T*>(u.grad);
  if (momentum) update<true>(s, param, grad, momentum, range);
  else update<false>(s, param, grad, momentum, range);
}

void update(const Sgd& s, const Update& u, Range range) {
  if (s.dtype == Dtype::float32) update<float>(s, u, range);
  else update<bfloat16>(s, u, range);
}

// A parameter and its momentum, changed by m rows and n columns of its gradient.
void descend(const Sgd& s, const float* grad, int64_t ld, float* param, float* momentum, int64_t ldw,
             int64_t m, int64_t n) {
  for (int64_t i = 0; i < m; ++i, param += ldw, grad += ld) {
    if (momentum) update<true>(s, param, grad, momentum + i * ldw, {0, n});
    else update<false>(s, param, grad, momentum, {0, n});
  }
}
