// What avx512.cpp and avx512bf16.cpp share, included after their pragmas: 32 registers of 16 floats, tails by
// masks.

typedef float V __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
constexpr int inner_rows = 5, inner_columns = 5;  // 25 sums + 5 of W + 1 of x

FASTMLP_INLINE Integer<V>::type extend(Halves h) {
  return Integer<V>::type(_mm512_cvtepu16_epi32(__m256i(h)));
}

template <class R, class T>
FASTMLP_INLINE R load_some(const T* p, int n) {
  if constexpr (sizeof(T) == sizeof(float)) return R(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
  else if constexpr (sizeof(R) == 64) return R(_mm512_maskz_loadu_epi16(__mmask32((1u << n) - 1), p));
  else return R(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
}
FASTMLP_INLINE void store_some(float* p, V v, int n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), __m512(v));
}
FASTMLP_INLINE void store_some(uint16_t* p, Halves h, int n) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), __m256i(h));
}
