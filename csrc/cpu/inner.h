// C = g(A Bᵀ + bias) with registers along the sum, which both operands are contiguous along: they are read as they are,
// and sums are added up across their lanes once, at the end.

#include "packing.h"

// y = g(sums), for m rows and n columns; and z, the sums themselves, where it is not null.
template <class T>
void finish(const Activation& activation, const float* sums, int64_t ld, T* z, T* y, int64_t ldy, int64_t m,
            int64_t n) {
  if (z) activate(Identity{}, sums, ld, z, ldy, m, n);
  activate(activation, sums, ld, y, ldy, m, n);
}

// Adds pairs of lanes of a and b: the sums of a's pairs of `step`-wide pieces, then those of b's.
template <int step, int... lane>
FASTMLP_INLINE V add_pieces(V a, V b, std::integer_sequence<int, lane...>) {
  constexpr auto source = [](int i) { return i / step * 2 * step + i % step; };
  return shuffled<source(lane)...>(a, b) + shuffled<source(lane) + step...>(a, b);
}

// Lane i of the result is the sum over the lanes of v[i], for i < n <= width: a tree, so that the order of
// the additions does not depend on n.
template <int n, int step = width / 2>
FASTMLP_INLINE V sum_lanes(const V* v) {
  constexpr int pairs = (n + 1) / 2;
  V sums[pairs];
#pragma GCC unroll 16
  for (int i = 0; i < pairs; ++i)
    sums[i] = add_pieces<step>(v[2 * i], 2 * i + 1 < n ? v[2 * i + 1] : V{},
                               std::make_integer_sequence<int, width>{});
  if constexpr (step > 1) return sum_lanes<pairs, step / 2>(sums);
  else return sums[0];
}

// sum[i][j] += x[i][k] w[j][k] for a register of k, or for the first n of them. Bound by FMA: loads rows +
// columns registers for rows * columns FMAs.
template <int terms, int rows, int columns, class T>
FASTMLP_INLINE void inner_step(V (&sum)[rows][columns], const T* x, int64_t ldx, const T* w, int64_t ldw,
                               int64_t n) {
  V b[columns];
#pragma GCC unroll 16
  for (int j = 0; j < columns; ++j) b[j] = slots<terms>(w + j * ldw, n);
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    const V a = slots<terms>(x + i * ldx, n);
#pragma GCC unroll 16
    for (int j = 0; j < columns; ++j) sum[i][j] = multiply_add<terms>(sum[i][j], a, b[j]);
  }
}

// sums[i][j] = Σ_k x[i][k] w[j][k] + bias[j] for a tile of rows x columns. Writes whole registers: what lies beyond the tile,
// the next one overwrites.
template <int rows, int columns, int terms, class T>
void inner_tile(int64_t K, const T* x, int64_t ldx, const T* w, int64_t ldw, const T* bias, float* sums,
                int64_t ld) {
  constexpr int step = terms * width;
  V sum[rows][columns] = {};
  int64_t k = 0;
  for (; k + step <= K; k += step) inner_step<terms>(sum, x + k, ldx, w + k, ldw, step);
  if (k < K) inner_step<terms>(sum, x + k, ldx, w + k, ldw, K - k);
  const V b = bias ? load(bias, columns) : V{};
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) store(sums + i * ld, sum_lanes<columns>(sum[i]) + b);
}

// The columns of a tile of so many rows: one or two rows alone are bound by the bandwidth of W, and want many
// streams of it and enough sums to hide the latency of an FMA.
constexpr int inner_columns_of(int rows) {
  const int sums = inner_rows * inner_columns;
  return rows == 1   ? int(smaller(8, smaller(width, sums)))
         : rows == 2 ? int(smaller(width, sums / 2))
                     : inner_columns;
}

// A few rows of x stay in the first-level cache while W streams past them from the second, a panel at a time,
// which stays there for all rows of x. The sums of the rows over the panel are then finished.
template <int terms, class T>
void forward_inner(const Forward& p, Range rows, Range columns) {
  const T* x = static_cast<const T*>(p.x);
  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);
  T *const z = static_cast<T*>(p.z), *const y = static_cast<T*>(p.y);
  constexpr int most = 8 * inner_rows, wide = 48, ld = wide + width;
  constexpr int64_t resident = 20 << 10;  // bytes
  const int64_t tiles = resident / (inner_rows * (p.K + 1) * int64_t(sizeof(T)));
  const int64_t few = inner_rows * larger(1, smaller(tiles, most / inner_rows));
  alignas(64) float sums[most * ld];
  for (int64_t n = columns.begin; n < columns.end; n += wide) {
    const int64_t n_count = smaller(wide, columns.end - n);
    for (int64_t m = rows.begin; m < rows.end; m += few) {
      const int64_t m_count = smaller(few, rows.end - m);
      for (int64_t i = 0; i < m_count; i += inner_rows)
        with_count<inner_rows>(smaller(inner_rows, m_count - i), [&](auto m_tile) {
          constexpr int tile_rows = decltype(m_tile)::value, step = inner_columns_of(tile_rows);
          for (int64_t j = 0; j < n_count; j += step)
            with_count<step>(smaller(step, n_count - j), [&](auto n_tile) {
              inner_tile<tile_rows, decltype(n_tile)::value, terms>(
                  p.K, x + (m + i) * p.ldx, p.ldx, weight + (n + j) * p.ldw, p.ldw,
                  bias ? bias + n + j : nullptr, sums + i * ld + j, ld);
            });
        });
      const int64_t at = m * p.N + n;
      finish(p.activation, sums, ld, z ? z + at : nullptr, y + at, p.N, m_count, n_count);
    }
  }
}
