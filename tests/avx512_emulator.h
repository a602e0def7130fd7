// The AVX-512 intrinsics that the kernels use, in plain C++, for processors that lack the instructions. The
// rest of a kernel is vectors of 64 bytes, which g++ computes in whatever registers there are.
//
// AddressSanitizer does not see what a masked instruction reads and writes. Here it does: the elements that
// the mask names, one by one.
//
// What the two instructions of AVX512-BF16 compute is in Intel's manual, at VDPBF16PS and VCVTNEPS2BF16. Which
// of several NaNs comes out is not modelled.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

typedef float __m512 __attribute__((vector_size(64)));
typedef int64_t __m512i __attribute__((vector_size(64)));
typedef int64_t __m256i __attribute__((vector_size(32)));
typedef uint16_t __m512bh __attribute__((vector_size(64)));
typedef uint16_t __m256bh __attribute__((vector_size(32)));
using __mmask16 = uint16_t;
using __mmask32 = uint32_t;

namespace emulator {

// The elements of type T that the mask names; the other lanes are 0.
template <class R, class T>
R load(uint32_t mask, const void* p) {
  T lanes[sizeof(R) / sizeof(T)] = {};
  for (unsigned i = 0; i < sizeof(R) / sizeof(T); ++i)
    if (mask >> i & 1) std::memcpy(&lanes[i], static_cast<const T*>(p) + i, sizeof(T));
  R r;
  std::memcpy(&r, lanes, sizeof(r));
  return r;
}

// AVX512-BF16 takes and returns 0 for subnormal numbers, whatever the mode of the processor.
inline float flush(float v) { return std::fabs(v) < FLT_MIN ? std::copysign(0.0f, v) : v; }

inline float widen(uint16_t v) {
  const uint32_t bits = uint32_t{v} << 16;
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return flush(f);
}

inline uint16_t narrow(float v) {
  v = flush(v);
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  if (v != v) return uint16_t(bits >> 16 | 0x40);  // quiet
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulator

inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  for (int i = 0; i < 16; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
}
inline __m512 _mm512_sqrt_ps(__m512 a) {
  for (int i = 0; i < 16; ++i) a[i] = std::sqrt(a[i]);
  return a;
}
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
  return emulator::load<__m512, float>(mask, p);
}
inline __m512i _mm512_cvtepu16_epi32(__m256i v) {
  uint16_t lanes[16];
  std::memcpy(lanes, &v, sizeof(v));
  int32_t wide[16];
  for (int i = 0; i < 16; ++i) wide[i] = lanes[i];
  __m512i r;
  std::memcpy(&r, wide, sizeof(r));
  return r;
}
inline __m512i _mm512_castsi256_si512(__m256i v) { return __m512i{v[0], v[1], v[2], v[3]}; }
inline __m512i _mm512_inserti64x4(__m512i to, __m256i v, int upper) {
  std::memcpy(reinterpret_cast<char*>(&to) + 32 * upper, &v, sizeof(v));
  return to;
}
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* p) {
  return emulator::load<__m512i, uint16_t>(mask, p);
}
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) {
  return emulator::load<__m256i, uint16_t>(mask, p);
}

// To each lane of sum, two fused multiply-adds one after the other: the odd elements first.
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  for (int i = 0; i < 16; ++i)
    for (int j = 2 * i + 1; j >= 2 * i; --j)
      sum[i] =
          emulator::flush(std::fma(emulator::widen(a[j]), emulator::widen(b[j]), emulator::flush(sum[i])));
  return sum;
}
inline __m256bh _mm512_cvtneps_pbh(__m512 v) {
  __m256bh r{};
  for (int i = 0; i < 16; ++i) r[i] = emulator::narrow(v[i]);
  return r;
}
