// The activations, in one place for both backends: y = g(z), and dz = dy · g'(z) with g' written as a
// function of y, so that only y is saved.
//
// V is float, or a vector of floats (GCC's vector extension): the same code serves a GPU thread and a SIMD
// register. NaN and infinities behave as in torch: relu(NaN) is NaN, and its gradient passes at NaN.
#pragma once

#include <cstdint>

#include "kernels.h"

#ifdef __CUDACC__
#define FASTMLP_INLINE __host__ __device__ __forceinline__
#else
#define FASTMLP_INLINE inline __attribute__((always_inline))
#endif

namespace fastmlp {

// The integer of V's shape.
template <class V>
struct Integer {
  using type = decltype(V{} < V{});
};
template <>
struct Integer<float> {
  using type = int32_t;
};

template <class To, class From>
FASTMLP_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// a b + c. Where the processor can, a vector's is rounded once: the file of its instruction set defines FASTMLP_FUSED.
// So no compiler decides, and all of them give the same bits; but for a GPU's, which is left to nvcc.
FASTMLP_INLINE float fused(float a, float b, float c) { return a * b + c; }
template <class V>
FASTMLP_INLINE V fused(V a, V b, V c) {
#ifdef FASTMLP_FUSED
  return V(FASTMLP_FUSED(a, b, c));
#else
  return a * b + c;
#endif
}
template <class V>
FASTMLP_INLINE V fused(V a, V b, float c) {
  return fused(a, b, V{} + c);
}

// 2^n for -127 < n < 128; n is arbitrary where the argument was NaN, so the exponent is cut to its field.
template <class V>
FASTMLP_INLINE V power_of_two(typename Integer<V>::type n) {
  return bit_cast<V>(((n + 127) & 0xff) << 23);
}

// e^z to about 1 ulp: z = n ln 2 + r with |r| <= ln 2 / 2, e^r by a minimax polynomial of degree 6 (relative
// error 3.4e-9), then two exact scalings by powers of two, which overflow to inf and underflow to 0 by
// themselves. ln 2 is split in two (Cody and Waite) so that r is exact.
template <class V>
FASTMLP_INLINE V exponential(V z) {
  using I = typename Integer<V>::type;
  const V zero{};
  z = z > 89.0f ? zero + 89.0f : z;
  z = z < -105.0f ? zero - 105.0f : z;
  const V shifter = zero + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  const V shifted = fused(z, zero + 1.44269504f, shifter);
  const V n = shifted - shifter;
  const V r = fused(n, zero - 1.42860677e-6f, fused(n, zero - 0.693145752f, z));
  V p = fused(r, zero + 1.395171768e-3f, 8.369598248e-3f);
  p = fused(p, r, 4.166618729e-2f);
  p = fused(p, r, 1.666651289e-1f);
  p = fused(p, r, 5.000000101e-1f);
  p = fused(p, r * r, r) + 1.0f;
  const I exponent = bit_cast<I>(shifted) - bit_cast<I>(shifter);
  const I half = exponent >> 1;
  return p * power_of_two<V>(half) * power_of_two<V>(exponent - half);
}

// Near 0 an odd minimax polynomial (relative error 4.1e-9), elsewhere 1 - 2 / (e^(2|z|) + 1).
template <class V>
FASTMLP_INLINE V hyperbolic_tangent(V z) {
  const V size = z < 0.0f ? -z : z;
  const V t = z * z;
  V p = fused(t, V{} - 5.717043313e-3f, 2.065058533e-2f);
  p = fused(p, t, -5.374349729e-2f);
  p = fused(p, t, 1.333149127e-1f);
  p = fused(p, t, -3.333328392e-1f);
  const V near_zero = fused(z * t, p, z);
  const V far = 1.0f - 2.0f / (exponential(size + size) + 1.0f);
  return size < 0.625f ? near_zero : (z < 0.0f ? -far : far);
}

template <Activation g, class V>
FASTMLP_INLINE V activate(V z) {
  if constexpr (g == Activation::relu) return z < 0.0f ? V{} : z;
  if constexpr (g == Activation::sigmoid) return 1.0f / (1.0f + exponential(-z));
  if constexpr (g == Activation::tanh) return hyperbolic_tangent(z);
  return z;
}

template <Activation g, class V>
FASTMLP_INLINE V activate_backward(V dy, V y) {
  if constexpr (g == Activation::relu) return y <= 0.0f ? V{} : dy;
  if constexpr (g == Activation::sigmoid) return dy * (1.0f - y) * y;
  if constexpr (g == Activation::tanh) return dy * fused(-y, y, 1.0f);
  return dy;
}

// Calls f(Constant<g>{}) with the activation as a compile-time constant: a kernel is instantiated for each.
template <Activation g>
struct Constant {
  static constexpr Activation value = g;
};

template <class F>
auto with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::relu:
      return f(Constant<Activation::relu>{});
    case Activation::sigmoid:
      return f(Constant<Activation::sigmoid>{});
    case Activation::tanh:
      return f(Constant<Activation::tanh>{});
    default:
      return f(Constant<Activation::identity>{});
  }
}

}  // namespace fastmlp
