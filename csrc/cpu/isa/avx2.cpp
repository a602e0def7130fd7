// AVX2 with FMA: 16 registers of 8 floats; tails by masked loads, of bfloat16 by copies.
#include "../backend.h"

#ifdef __x86_64__
#include <immintrin.h>

// Nothing from torch or the standard library may be included from here on: the linker could keep an AVX2 copy
// of an inline function for everyone.
#pragma GCC target("avx2,fma")

#define FASTMLP_FUSED(a, b, c) _mm256_fmadd_ps(__m256(a), __m256(b), __m256(c))
#define FASTMLP_SQUARE_ROOT(v) _mm256_sqrt_ps(__m256(v))

#include "../../activation.h"
#include "../../loss.h"
#include "../../optimizer.h"

namespace fastmlp::cpu {
namespace avx2 {

typedef float V __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));
constexpr int inner_rows = 4, inner_columns = 3;  // 12 sums + 3 of W, x from memory
constexpr int outer_rows = 6, outer_vectors = 2;  // 12 sums + 2 of B + 1 of A
constexpr bool multiplies_pairs = false;

FASTMLP_INLINE Integer<V>::type extend(Halves h) {
  return Integer<V>::type(_mm256_cvtepu16_epi32(__m128i(h)));
}

FASTMLP_INLINE __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

template <class R, class T>
FASTMLP_INLINE R load_some(const T* p, int n) {
  R r{};
  if constexpr (sizeof(T) == sizeof(float)) r = R(_mm256_maskload_ps(p, first(n)));
  else __builtin_memcpy(&r, p, n * sizeof(T));
  return r;
}

#include "products.inc"

}  // namespace avx2
const Kernels avx2_kernels = avx2::kernels;
}  // namespace fastmlp::cpu
#endif
