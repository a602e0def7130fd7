// Activations of blocks of elements, for one instruction set. Each is compiled once for the elements it reads and
// writes, whatever product they belong to: packing.h forms dz and y in a buffer of the first-level cache, outer.h and
// inner.h finish sums from one. Bound by arithmetic but for the simplest.

#include "registers.h"

// Asks for the line at p in L2. Blocks are read in short runs, which end before the processor foresees them.
FASTMLP_INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

constexpr int64_t ahead = 8;  // rows

// y = g(z), [rows, n]. Where y is bfloat16, it is g of z as bfloat16: so it is the same from z as it is stored.
template <class G, class Z, class Y>
void activate(const G g, const Z* z, int64_t ldz, Y* y, int64_t ldy, int64_t rows, int64_t n) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; j += width) {
      fetch(z + (i + ahead) * ldz + j);
      V v = load(z + i * ldz + j, n - j);
      if constexpr (std::is_same_v<Y, bfloat16>) v = widen(narrow(v));
      store(y + i * ldy + j, g(v), n - j);
    }
}
template <class Z, class Y>
void activate(const Activation& activation, const Z* z, int64_t ldz, Y* y, int64_t ldy, int64_t rows,
              int64_t n) {
  with_activation(activation, [&](auto g) { activate(g, z, ldz, y, ldy, rows, n); });
}

// dz = dy · g', [rows, n]
template <class G, class T>
void differentiate(const G g, const T* dy, const T* saved, int64_t ld, float* dz, int64_t ldz, int64_t rows,
                   int64_t n) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; j += width) {
      const int64_t at = i * ld + j;
      fetch(dy + at + ahead * ld);
      fetch(saved + at + ahead * ld);
      store(dz + i * ldz + j, g.gradient(load(dy + at, n - j), load(saved + at, n - j)), n - j);
    }
}
template <class T>
void differentiate(const Activation& activation, const T* dy, const T* saved, int64_t ld, float* dz,
                   int64_t ldz, int64_t rows, int64_t n) {
  with_activation(activation, [&](auto g) { differentiate(g, dy, saved, ld, dz, ldz, rows, n); });
}
