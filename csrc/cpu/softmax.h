// Cross-entropy over rows of logits, for one instruction set: each row's loss and gradient, while it is in L1.
//
//   lse - z_t = log Σ_c e^(z_c - top) + (top - z_t)     top = max_c z_c
//
// Both terms are not negative, so nothing cancels. Bound by the exponentials, one for each logit; where classes are
// few, by the latency of the two reductions across lanes, which the processor overlaps from row to row.

struct Larger {
  static FASTMLP_INLINE V of(V a, V b) { return a > b ? a : b; }  // b where a is NaN
};
struct Sum {
  static FASTMLP_INLINE V of(V a, V b) { return a + b; }
};

// In every lane, Op over all lanes.
template <class Op, int step, int... lane>
FASTMLP_INLINE V across(V v, std::integer_sequence<int, lane...> lanes) {
  v = Op::of(v, shuffled<(lane ^ step)...>(v, v));
  if constexpr (step > 1) return across<Op, step / 2>(v, lanes);
  else return v;
}
template <class Op>
FASTMLP_INLINE V across(V v) {
  return across<Op, width / 2>(v, std::make_integer_sequence<int, width>{});
}

template <int... lane>
FASTMLP_INLINE Bits lane_numbers(std::integer_sequence<int, lane...>) {
  return Bits{lane...};
}

// The first n lanes of v, and `other` in the rest.
FASTMLP_INLINE V first_lanes(V v, int64_t n, V other) {
  return lane_numbers(std::make_integer_sequence<int, width>{}) < int(smaller(n, width)) ? v : other;
}

// What label smoothing adds: returns Σ_c w_c (top - z_c), and takes w_c `share` from the gradient.
template <class T>
float smooth(const CrossEntropy& p, const T* z, V top, float share, float* grad) {
  V sum{};
  for (int64_t c = 0; c < p.C; c += width) {
    const int64_t n = p.C - c;
    const V w = p.weight ? load(p.weight + c, n) : V{} + 1.0f;
    sum += first_lanes(w * (top - load(z + c, n)), n, V{});
    if (grad) store(grad + c, load(grad + c, n) - share * w, n);
  }
  return across<Sum>(sum)[0];
}

template <class T>
double cross_entropy(const CrossEntropy& p, float scale, Range rows) {
  const float kept = 1 - p.label_smoothing, spread = p.label_smoothing / float(p.C);
  float weights = float(p.C);
  if (p.weight && spread > 0) {
    V sum{};
    for (int64_t c = 0; c < p.C; c += width) sum += load(p.weight + c, p.C - c);
    weights = across<Sum>(sum)[0];
  }
  // The last register, whole or in part, stays one; those before it pass through the gradient's memory.
  const int64_t before = (p.C - 1) / width * width, rest = p.C - before;
  double losses = 0;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const T* z = static_cast<const T*>(p.input) + i * p.C;
    float* grad = p.grad ? p.grad + i * p.C : nullptr;

    const V last = load(z + before, rest);
    V top = first_lanes(last, rest, V{} - __builtin_inff());
    for (int64_t c = 0; c < before; c += width) top = Larger::of(load(z + c), top);
    top = across<Larger>(top);

    // Not e^-inf in the lanes that are not there: to underflow takes long.
    const V last_power = first_lanes(exponential(first_lanes(last, rest, top) - top), rest, V{});
    V sum = last_power;
    for (int64_t c = 0; c < before; c += width) {
      const V power = exponential(load(z + c) - top);
      if (grad) store(grad + c, power);
      sum += power;
    }
    sum = across<Sum>(sum);

    const int64_t t = p.target[i];
    const bool counts = t != p.ignore_index;
    const float w = !counts ? 0 : p.weight ? p.weight[t] : 1;
    if (grad) {
      const V ratio = (counts ? scale * (kept * w + spread * weights) : 0) / sum;
      for (int64_t c = 0; c < before; c += width) store(grad + c, load(grad + c) * ratio);
      store(grad + before, last_power * ratio, rest);
      if (counts) grad[t] -= scale * (kept * w);
    }
    float loss = 0;
    if (counts) {
      const float log_sum = __builtin_logf(sum[0]);
      loss = kept * w * (log_sum + (top - load(z + t, 1))[0]);
      if (spread > 0) loss += spread * (log_sum * weights + smooth(p, z, top, scale * spread, grad));
    }
    if (p.reduction == Reduction::none) store(static_cast<T*>(p.loss) + i, V{} + loss, 1);
    losses += loss;
  }
  return losses;
}

double cross_entropy(const CrossEntropy& p, float scale, Range rows) {
  return p.dtype == Dtype::float32 ? cross_entropy<float>(p, scale, rows)
                                   : cross_entropy<bfloat16>(p, scale, rows);
}
