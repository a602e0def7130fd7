// Losses that are a mean or a sum over elements, for one instruction set: the loss and its gradient in one pass.
//
//   mean squared error        (y - t)²                                           2 (y - t)
//   binary cross-entropy of   w ((1 - t) y + q (log(1 + e^-|y|) + max(-y, 0)))   w (q / (1 + e^-y) - p t)
//   logits                    with q = 1 + (p - 1) t

// The lanes of values [N] that belong to the n elements from i on of rows of N; ones where there are no values.
FASTMLP_INLINE V over_outputs(const float* values, int64_t N, int64_t i, int64_t n) {
  V lanes{};
  if (!values) return lanes + 1.0f;
  int64_t column = i % N;
  n = smaller(n, width);
  if (column + n <= N) return load(values + column, n);
  for (int lane = 0; lane < n; ++lane) {
    lanes[lane] = values[column];
    column = column + 1 < N ? column + 1 : 0;
  }
  return lanes;
}

template <Loss kind>
double pointwise_loss(const Pointwise& p, const float* y, float scale, float* grad, Range range) {
  double sum = 0;
  V sums{};
  for (int64_t i = range.begin; i < range.end; i += width) {
    const int64_t n = range.end - i;
    const V z = load(y + i, n), t = load(p.target + i, n);
    V loss, slope;
    if constexpr (kind == Loss::mse) {
      const V difference = z - t;
      loss = difference * difference;
      slope = difference + difference;
    } else {
      const V weight = over_outputs(p.weight, p.N, i, n), positive = over_outputs(p.pos_weight, p.N, i, n);
      const V zero{}, e = exponential(z < 0.0f ? z : -z), larger = 1.0f / (1.0f + e);
      const V q = fused(positive - 1.0f, t, 1.0f);
      loss = weight * fused(1.0f - t, z, q * (log_of_1_and(e) + (z < 0.0f ? -z : zero)));
      slope = weight * fused(q, z < 0.0f ? e * larger : larger, -(positive * t));
    }
    store(grad + i, scale * slope, n);
    if (n >= width) sums += loss;
    else
      for (int lane = 0; lane < n; ++lane) sum += loss[lane];
  }
  for (int lane = 0; lane < width; ++lane) sum += sums[lane];
  return sum;
}

double pointwise_loss(Loss loss, const Pointwise& p, const float* y, float scale, float* grad, Range range) {
  return loss == Loss::mse ? pointwise_loss<Loss::mse>(p, y, scale, grad, range)
                           : pointwise_loss<Loss::bce_with_logits>(p, y, scale, grad, range);
}
