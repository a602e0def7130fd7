// AVX-512: 32 registers of 16 floats, tails loaded by masks.
#include "../backend.h"

#ifdef __x86_64__
#if FASTMLP_EMULATE_AVX512
#include "avx512_emulator.h"
#else
#include <immintrin.h>

// Nothing from torch or the standard library may be included from here on: the linker could keep an AVX-512
// copy of an inline function for everyone.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

#define FASTMLP_FUSED(a, b, c) _mm512_fmadd_ps(__m512(a), __m512(b), __m512(c))
#define FASTMLP_SQUARE_ROOT(v) _mm512_sqrt_ps(__m512(v))

#include "../../activation.h"
#include "../../loss.h"
#include "../../optimizer.h"

namespace fastmlp::cpu {
namespace avx512 {

#include "avx512.inc"
constexpr bool multiplies_pairs = false;

#include "products.inc"

}  // namespace avx512
const Kernels avx512_kernels = avx512::kernels;
}  // namespace fastmlp::cpu
#endif
