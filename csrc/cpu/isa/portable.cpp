// Any processor: registers of 4 floats, which every 64-bit x86 (SSE2) and Arm (NEON) has; tails by copies.
#include "../backend.h"

#ifdef __aarch64__
#include <arm_neon.h>
#define FASTMLP_FUSED(a, b, c) vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b))
#define FASTMLP_SQUARE_ROOT(v) vsqrtq_f32(float32x4_t(v))
#elif defined(__x86_64__)
#include <xmmintrin.h>
#define FASTMLP_SQUARE_ROOT(v) _mm_sqrt_ps(__m128(v))
#endif

#include "../../activation.h"
#include "../../loss.h"
#include "../../optimizer.h"

namespace fastmlp::cpu {
namespace portable {

typedef float V __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(8)));
constexpr int inner_rows = 3, inner_columns = 3;  // 9 sums + 3 of W + 1 of x + 1 product, without FMA
constexpr int outer_rows = 4, outer_vectors = 2;  // 8 sums + 2 of B + 1 of A + 1 product
constexpr bool multiplies_pairs = false;

FASTMLP_INLINE Integer<V>::type extend(Halves h) { return __builtin_convertvector(h, Integer<V>::type); }

template <class R, class T>
FASTMLP_INLINE R load_some(const T* p, int n) {
  R r{};
  __builtin_memcpy(&r, p, n * sizeof(T));
  return r;
}

#include "products.inc"

}  // namespace portable
const Kernels portable_kernels = portable::kernels;
}  // namespace fastmlp::cpu
