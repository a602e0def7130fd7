// Copies of the operands' blocks in the order in which the register tiles read them, as slots (registers.h).
//
//   A block [MC, KC]   in groups of MR rows; within a group by rows, [MR][KC], or by slots, [KC][MR]
//   B block [KC, NC]   in panels of NR columns, [KC][NR]
//
// with MR <= width. A tile's reads are then contiguous: in memory its rows may be pages apart, or fall on one another in the
// first-level cache (at multiples of 4096 bytes). The left operand's derivative is formed on the way, and its
// sums: so dz is read from what it is made of, and is never in memory itself.

#include "registers.h"

constexpr int MR = outer_rows, NR = outer_vectors * width;
constexpr int64_t KC = whole_sum, MC = 32 * MR,
                  NC = 1024 / NR * NR;      // in slots; A's block for L2, a panel for L1 or L2
constexpr int64_t group = MR * KC + width;  // a group by slots ends with a whole register
constexpr int64_t panel = KC * NR;
static_assert(MR <= width && KC % width == 0);

// Asks for the line at p in L2. Blocks are read in short runs, which end before the processor foresees them.
FASTMLP_INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// dz = dy g'(y), the first n elements of a register.
template <Activation g, class T>
FASTMLP_INLINE V derivative(const T* dy, const T* y, int64_t n) {
  const V v = load(dy, n);
  if constexpr (g == Activation::identity) return v;
  else return activate_backward<g>(v, load(y, n));
}

// [MR][KC] from rows along the sum.
template <Activation g, int terms, class T>
void pack_rows(float* to, const T* a, const T* y, int64_t ld, int64_t rows, int64_t depth) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = to + i / MR * group + i % MR * KC;
    for (int64_t p = 0; p < depth; p += terms * width, row += width) {
      const int64_t at = i * ld + p, n = depth - p;
      fetch(a + at + 4 * ld);
      if (g != Activation::identity) fetch(y + at + 4 * ld);
      if constexpr (terms == 1) store(row, derivative<g>(a + at, y + at, n));
      else if constexpr (g == Activation::identity) store(row, slots<terms>(a + at, n));
      else {
        const int64_t rest = larger(n - width, 0);
        store(row, joined(narrow(derivative<g>(a + at, y + at, n)),
                          narrow(derivative<g>(a + at + width, y + at + width, rest))));
      }
    }
  }
}

// [KC][MR] from rows across the sum, and each column's sum where asked for. What a register holds beyond the
// group's MR columns, the next one overwrites.
template <Activation g, int terms, class T>
void pack_columns(float* to, const T* a, const T* y, int64_t ld, int64_t rows, int64_t depth, float* sums,
                  bool accumulate) {
  constexpr int64_t block =
      4;  // rows, whose lines stay in L1 from group to group even if all fall on one set
  V sum[MC / MR] = {}, recent[MC / MR] = {};  // the latest 64 rows apart, so that roundings grow slowly
  for (int64_t first = 0; first < depth; first += block)
    for (int64_t i = 0; i < rows; i += MR) {
      const int64_t n = rows - i, end = smaller(first + block, depth);
      float* slot = to + i / MR * group + first / terms * MR;
      V partial{};
      for (int64_t p = first; p < end; p += terms, slot += MR) {
        const int64_t at = p * ld + i;
        fetch(a + at + 2 * block * ld);
        if (g != Activation::identity) fetch(y + at + 2 * block * ld);
        const V v = derivative<g>(a + at, y + at, n);
        partial += v;
        if constexpr (terms == 1) store(slot, v);
        else {
          const V next = p + 1 < end ? derivative<g>(a + at + ld, y + at + ld, n) : V{};
          partial += next;
          store(slot, paired(narrow(v), narrow(next)));
        }
      }
      recent[i / MR] += partial;
      if (end % 64 && end < depth) continue;
      sum[i / MR] += recent[i / MR];
      recent[i / MR] = V{};
    }
  for (int64_t i = 0; sums && i < rows; i += MR) {
    const int64_t n = smaller(MR, rows - i);
    store(sums + i, accumulate ? sum[i / MR] + load(sums + i, n) : sum[i / MR], n);
  }
}

// [KC][NR] from rows across the sum, and 0 beyond the last column.
template <int terms, class T>
void pack_panels(float* to, const T* b, int64_t ld, int64_t depth, int64_t columns) {
  constexpr int64_t block = 8;  // rows: read and written in runs that the processor foresees
  for (int64_t first = 0; first < depth; first += block)
    for (int64_t j = 0; j < columns; j += NR) {
      float* slot = to + j / NR * panel + first / terms * NR;
      const int64_t end = smaller(first + block, depth);
      for (int64_t p = first; p < end; p += terms, slot += NR)
#pragma GCC unroll 16
        for (int64_t v = 0; v < NR; v += width) {
          const T* at = b + p * ld + j + v;
          fetch(at + block * ld);
          const int64_t n = larger(columns - j - v, 0);
          if constexpr (terms == 1) store(slot + v, load(at, n));
          else store(slot + v, paired(halves(at, n), p + 1 < end ? halves(at + ld, n) : Halves{}));
        }
    }
}

// Of a and b as rows of a matrix of blocks of `step` lanes: its transpose.
template <int step, int... lane>
FASTMLP_INLINE void interchange(V& a, V& b, std::integer_sequence<int, lane...>) {
  const V upper = shuffled<(lane & step ? width + lane - step : lane)...>(a, b);
  b = shuffled<(lane & step ? width + lane : lane + step)...>(a, b);
  a = upper;
}

template <int step = width / 2>
FASTMLP_INLINE void transpose(V* v) {
#pragma GCC unroll 16
  for (int i = 0; i < width; ++i)
    if (!(i & step)) interchange<step>(v[i], v[i + step], std::make_integer_sequence<int, width>{});
  if constexpr (step > 1) transpose<step / 2>(v);
}

// [KC][NR] from rows along the sum, of which each is a column of B, and 0 beyond the last.
template <int terms, class T>
void pack_transposed(float* to, const T* b, int64_t ld, int64_t depth, int64_t columns) {
  for (int64_t j = 0; j < ceil_div(columns, NR) * NR; j += width) {
    float* slot = to + j / NR * panel + j % NR;
    for (int64_t p = 0; p < depth; p += terms * width, slot += width * NR) {
      V v[width];
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i)
        v[i] = j + i < columns ? slots<terms>(b + (j + i) * ld + p, depth - p) : V{};
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) store(slot + i * NR, v[i]);
    }
  }
}
