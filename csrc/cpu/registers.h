// Registers of one instruction set: float32 and bfloat16 in and out of them, whole or in part, and their lanes.
//
// Included (by way of products.h) by avx512bf16.cpp, avx512.cpp, avx2.cpp and portable.cpp, each inside its own
// namespace and after it has defined
//
//   V                            a register of float32
//   Halves                       half a register of uint16_t: as many bfloat16
//   extend(h)                    the lanes of a Halves as integers of 32 bits: compilers make several steps of it
//   load_some<R>(p, n)           an R of the first n elements at p; others are not read, their lanes are 0
//   store_some(p, r, n)          the first n lanes of r to p
//   inner_rows x inner_columns   the register tile of x Wᵀ, in outputs
//   outer_rows x outer_vectors   the register tile of A B, in outputs and registers
//   multiplies_pairs             whether the processor multiplies bfloat16, and there are
//   add_pairs(sum, a, b)         to each lane of sum, the products of the lane's two bfloat16 in a and in b
//   round(v)                     v as bfloat16
//   joined(first, second)        the lanes of both, side by side along the sum

constexpr int width = sizeof(V) / sizeof(float);
using Bits = typename Integer<V>::type;

// Lane i of the result is lane `lane[i]` of a and b, one after the other.
template <int... lane>
FASTMLP_INLINE V shuffled(V a, V b) {
  return __builtin_shuffle(a, b, Bits{lane...});
}

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// ---- loads and stores: float32 as it is; bfloat16 widened on the way in, rounded to nearest even on the way out

struct bfloat16 {
  uint16_t bits;
};

// A lane for each pair (first[i], second[i]), the first in its low half.
FASTMLP_INLINE V paired(Halves first, Halves second) {
  return bit_cast<V>(extend(first) | extend(second) << 16);
}

FASTMLP_INLINE V widen(Halves h) { return bit_cast<V>(extend(h) << 16); }

template <class R>
FASTMLP_INLINE Halves narrow(R v) {
  if constexpr (multiplies_pairs) return round(v);
  Bits bits = bit_cast<Bits>(v);
  bits = bits + 0x7fff + ((bits >> 16) & 1);
  bits = v != v ? Bits{} + 0x7fc00000 : bits;
  return __builtin_convertvector(bits >> 16, Halves);
}

template <class R, class T>
FASTMLP_INLINE R load_all(const T* p) {
  R r;
  __builtin_memcpy(&r, p, sizeof(r));
  return r;
}

FASTMLP_INLINE V load(const float* p) { return load_all<V>(p); }
FASTMLP_INLINE V load(const bfloat16* p) { return widen(load_all<Halves>(p)); }
FASTMLP_INLINE void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof(v)); }
FASTMLP_INLINE void store(bfloat16* p, V v) {
  const Halves h = narrow(v);
  __builtin_memcpy(p, &h, sizeof(h));
}

// The first n elements, or a whole register where there are more.
FASTMLP_INLINE V load(const float* p, int64_t n) { return n < width ? load_some<V>(p, int(n)) : load(p); }
FASTMLP_INLINE V load(const bfloat16* p, int64_t n) {
  return n < width ? widen(load_some<Halves>(&p->bits, int(n))) : load(p);
}
FASTMLP_INLINE void store(float* p, V v, int64_t n) { n < width ? store_some(p, v, int(n)) : store(p, v); }
FASTMLP_INLINE void store(bfloat16* p, V v, int64_t n) {
  n < width ? store_some(&p->bits, narrow(v), int(n)) : store(p, v);
}

// The same as bfloat16.
FASTMLP_INLINE Halves halves(const float* p, int64_t n) { return narrow(load(p, n)); }
FASTMLP_INLINE Halves halves(const bfloat16* p, int64_t n) {
  return n < width ? load_some<Halves>(&p->bits, int(n)) : load_all<Halves>(p);
}

// ---- slots: what a lane multiplies at a time, one float32, or the bfloat16 of two terms of the sum

template <class T>
constexpr int terms = multiplies_pairs && std::is_same_v<T, bfloat16> ? 2 : 1;

// Elements that lie side by side along the sum, the first n of them.
template <int terms, class T>
FASTMLP_INLINE V slots(const T* p, int64_t n) {
  if constexpr (terms == 1) return load(p, n);
  else if constexpr (std::is_same_v<T, bfloat16>)
    return n < 2 * width ? load_some<V>(&p->bits, int(n)) : load_all<V>(p);
  else return joined(halves(p, n), halves(p + width, larger(n - width, 0)));
}

template <int terms, class R>
FASTMLP_INLINE R multiply_add(R sum, R a, R b) {
  if constexpr (terms == 2) return add_pairs(sum, a, b);
  else return fused(a, b, sum);
}

// Calls f(Count<n>{}) with n, 1 <= n <= most, as a compile-time constant: the size of a register tile.
template <int n>
struct Count {
  static constexpr int value = n;
};
template <int most, class F>
FASTMLP_INLINE void with_count(int64_t n, F f) {
  if constexpr (most > 1) {
    if (n < most) return with_count<most - 1>(n, f);
  }
  f(Count<most>{});
}
