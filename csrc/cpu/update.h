// One step of gradient descent for a range of a tensor's elements, on one thread. Bound by bandwidth: w, its
// gradient and its momentum are read once, w and the momentum written once.

template <bool has_momentum, class T>
void update(const Sgd s, T* param, const T* grad, T* momentum, Range range) {
  for (int64_t i = range.begin; i < range.end; i += width) {
    const int64_t n = range.end - i;
    V m{};
    if (has_momentum && !s.first) m = load(momentum + i, n);
    const V w = updated(load(param + i, n), load(grad + i, n), has_momentum ? &m : nullptr, s);
    if (has_momentum) store(momentum + i, m, n);
    store(param + i, w, n);
  }
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
