// AVX512-BF16: AVX-512 whose products of bfloat16 take two terms of a sum a lane, at twice float32's speed.
#include "../backend.h"

#ifdef __x86_64__
#if FASTMLP_EMULATE_AVX512BF16
#include "avx512_emulator.h"
#else
#include <immintrin.h>

// Nothing from torch or the standard library may be included from here on: the linker could keep an
// AVX512-BF16 copy of an inline function for everyone.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#endif

#define FASTMLP_FUSED(a, b, c) _mm512_fmadd_ps(__m512(a), __m512(b), __m512(c))
#define FASTMLP_SQUARE_ROOT(v) _mm512_sqrt_ps(__m512(v))

#include "../../activation.h"
#include "../../loss.h"
#include "../../optimizer.h"

namespace fastmlp::cpu {
namespace avx512bf16 {

#include "avx512.inc"
constexpr bool multiplies_pairs = true;

// Both take subnormal numbers for 0, and round to nearest even.
FASTMLP_INLINE V add_pairs(V sum, V a, V b) {
  return V(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b)));
}
FASTMLP_INLINE V joined(Halves first, Halves second) {
  return V(_mm512_inserti64x4(_mm512_castsi256_si512(__m256i(first)), __m256i(second), 1));
}
FASTMLP_INLINE Halves round(V v) { return Halves(_mm512_cvtneps_pbh(__m512(v))); }

#include "products.inc"

}  // namespace avx512bf16
const Kernels avx512bf16_kernels = avx512bf16::kernels;
}  // namespace fastmlp::cpu
#endif
