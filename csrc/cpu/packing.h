// Copies of the operands' blocks, as slots (registers.h), in the order in which the register tiles read them.
//
//   A block [MC, KC]   in groups of MR rows; within a group by rows, [MR][KC], or by slots, [KC][MR]
//   B block [KC, NC]   in panels of NR columns, [KC][NR]
//
// A tile then reads memory from one address on. In the matrix itself its rows may be pages apart, or fall on one
// another in the first-level cache, as they do at multiples of 4096 bytes. A is copied by groups and MR <= width.
//
// Here dz = dy g' is formed, and the y of a layer that has kept z alone: neither is ever in memory as a whole.

#include "blocks.h"

constexpr int MR = outer_rows, NR = outer_vectors * width;
constexpr int64_t KC = whole_sum, MC = 32 * MR,
                  NC = 1024 / NR * NR;      // in slots; A's block for L2, a panel for L1 or L2
constexpr int64_t group = MR * KC + width;  // a group by slots ends with a whole register
constexpr int64_t panel = KC * NR;
static_assert(MR <= width && KC % width == 0);

// A ReLU's dz, formed from what two pointers point to as it is loaded: too simple to be worth a buffer.
template <class T>
struct Rectified {
  const T *dy, *y;
  FASTMLP_INLINE Rectified operator+(int64_t n) const { return {dy + n, y + n}; }
};
template <class T>
FASTMLP_INLINE void fetch(Rectified<T> p) {
  fetch(p.dy), fetch(p.y);
}
template <class T>
FASTMLP_INLINE V load(Rectified<T> p, int64_t n) {
  return Relu{}.gradient(load(p.dy, n), load(p.y, n));
}
template <int terms, class T>
FASTMLP_INLINE V slots(Rectified<T> p, int64_t n) {
  if constexpr (terms == 1) return load(p, n);
  else return joined(narrow(load(p, n)), narrow(load(p + width, larger(n - width, 0))));
}

// Where a block of an operand begins, a pointer or as good as one, and how far its rows are apart.
template <class Pointer>
struct Rows {
  Pointer data;
  int64_t ld;
};

// An operand as it lies in memory. All sources have rows(): the block of `rows` rows and n columns from (i, j) on.
template <class Pointer>
struct Plain {
  Pointer data;
  int64_t ld;
  FASTMLP_INLINE Rows<Pointer> rows(int64_t i, int64_t j, int64_t rows, int64_t n) const {
    return {data + (i * ld + j), ld};
  }
};

// dz, and y: a block at a time, in `buffer`.
template <class T>
struct Differentiated {
  const Activation& activation;
  const T *dy, *saved;
  int64_t ld;
  float* buffer;
  FASTMLP_INLINE Rows<const float*> rows(int64_t i, int64_t j, int64_t rows, int64_t n) const {
    const int64_t at = i * ld + j, wide = ceil_div(n, width) * width;
    differentiate(activation, dy + at, saved + at, ld, buffer, wide, rows, n);
    return {buffer, wide};
  }
};
template <class T>
struct Activated {
  const Activation& activation;
  const T* z;
  int64_t ld;
  T* buffer;
  FASTMLP_INLINE Rows<const T*> rows(int64_t i, int64_t j, int64_t rows, int64_t n) const {
    const int64_t wide = ceil_div(n, width) * width;
    activate(activation, z + i * ld + j, ld, buffer, wide, rows, n);
    return {buffer, wide};
  }
};

// The rows of a source that are asked for at a time: few enough for L1, and read in runs that the processor foresees.
constexpr int64_t rows_of_columns = 4, rows_of_panel = 8;
constexpr int64_t buffer_size =
    larger(MR * 2 * KC, larger(rows_of_columns* MC, rows_of_panel* NR));  // of floats

// [MR][KC] from rows along the sum.
template <int terms, class Source>
void pack_rows(float* to, const Source source, int64_t rows, int64_t depth) {
  for (int64_t i = 0; i < rows; i += MR, to += group) {
    const int64_t count = smaller(MR, rows - i);
    const auto from = source.rows(i, 0, count, depth);
    for (int64_t r = 0; r < count; ++r) {
      float* row = to + r * KC;
      for (int64_t p = 0; p < depth; p += terms * width, row += width) {
        const auto at = from.data + (r * from.ld + p);
        fetch(at + 4 * from.ld);
        store(row, slots<terms>(at, depth - p));
      }
    }
  }
}

// [KC][MR] from rows across the sum, and each column's sum where asked for. What a register holds beyond the
// group's MR columns, the next one overwrites.
template <int terms, class Source>
void pack_columns(float* to, const Source source, int64_t rows, int64_t depth, float* sums, bool accumulate) {
  constexpr int64_t block = rows_of_columns;
  V sum[MC / MR] = {}, recent[MC / MR] = {};  // the latest 64 rows apart, so that roundings grow slowly
  for (int64_t first = 0; first < depth; first += block) {
    const int64_t count = smaller(block, depth - first);
    const auto from = source.rows(first, 0, count, rows);
    for (int64_t i = 0; i < rows; i += MR) {
      const int64_t n = rows - i;
      float* slot = to + i / MR * group + first / terms * MR;
      V partial{};
      for (int64_t p = 0; p < count; p += terms, slot += MR) {
        const auto at = from.data + (p * from.ld + i);
        fetch(at + 2 * block * from.ld);
        const V v = load(at, n);
        partial += v;
        if constexpr (terms == 1) store(slot, v);
        else {
          const V next = p + 1 < count ? load(at + from.ld, n) : V{};
          partial += next;
          store(slot, paired(narrow(v), narrow(next)));
        }
      }
      recent[i / MR] += partial;
      if ((first + count) % 64 && first + count < depth) continue;
      sum[i / MR] += recent[i / MR];
      recent[i / MR] = V{};
    }
  }
  for (int64_t i = 0; sums && i < rows; i += MR) {
    const int64_t n = smaller(MR, rows - i);
    store(sums + i, accumulate ? sum[i / MR] + load(sums + i, n) : sum[i / MR], n);
  }
}

// [KC][NR] from rows across the sum, and 0 beyond the last column.
template <int terms, class Source>
void pack_panels(float* to, const Source source, int64_t depth, int64_t columns) {
  constexpr int64_t block = rows_of_panel;
  for (int64_t first = 0; first < depth; first += block)
    for (int64_t j = 0; j < columns; j += NR) {
      float* slot = to + j / NR * panel + first / terms * NR;
      const int64_t count = smaller(block, depth - first);
      const auto from = source.rows(first, j, count, smaller(NR, columns - j));
      for (int64_t p = 0; p < count; p += terms, slot += NR)
#pragma GCC unroll 16
        for (int64_t v = 0; v < NR; v += width) {
          const auto at = from.data + (p * from.ld + v);
          fetch(at + block * from.ld);
          const int64_t n = larger(columns - j - v, 0);
          if constexpr (terms == 1) store(slot + v, load(at, n));
          else store(slot + v, paired(halves(at, n), p + 1 < count ? halves(at + from.ld, n) : Halves{}));
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
