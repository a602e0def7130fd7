// The activations, in one table for both backends: y = g(z), and dz = dy · g'(z).
//
// A row of the table is a type. Its members are its parameters, in the order in which an Activation has them:
//
//   struct LeakyRelu {
//     float slope;
//     Reads reads() const;                                   // what backward reads to find g'
//     template <class V> V operator()(V z) const;            // y
//     template <class V> V gradient(V dy, V saved) const;    // dz, from y or z, as it reads
//   };
//
// Backward reads y where g' can be had from it as exactly as from z, over the whole range. Both are right for NaN and
// infinities as torch is: relu(NaN) is NaN, and its gradient passes at NaN.
//
// V is float, or a vector of floats (GCC's vector extension): the same code serves a GPU thread and a SIMD register. So
// nothing branches on an element, and nothing is called.
#pragma once

#include <cstdint>
#include <type_traits>

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

// ---- functions of a vector's elements

// c0 + x (c1 + x (c2 + ...)), the coefficients from the last to the first.
template <class V>
FASTMLP_INLINE V polynomial(V, V sum) {
  return sum;
}
template <class V, class... Rest>
FASTMLP_INLINE V polynomial(V x, V sum, float next, Rest... rest) {
  return polynomial(x, fused(sum, x, next), rest...);
}

// Within the bounds; NaN stays NaN.
template <class V>
FASTMLP_INLINE V clamped(V z, float low, float high) {
  z = z < low ? V{} + low : z;
  return z > high ? V{} + high : z;
}

// 2^n for -127 < n < 128; n is arbitrary where the argument was NaN, so the exponent is cut to its field.
template <class V>
FASTMLP_INLINE V power_of_two(typename Integer<V>::type n) {
  return bit_cast<V>(((n + 127) & 0xff) << 23);
}

// e^z = (1 + p) 2^n for |z| <= 105, with z = n ln 2 + r, |r| <= ln 2 / 2 and p = e^r - 1. p is a minimax polynomial of
// degree 6 (relative error of e^r: 3.4e-9). ln 2 is split in two (Cody and Waite) so that r is exact.
template <class V>
struct Exponential {
  V p;
  typename Integer<V>::type n;
  explicit FASTMLP_INLINE Exponential(V z) {
    using I = typename Integer<V>::type;
    // 1.5 * 2^23 + 127: adding it rounds to an integer, left in the low bits as an exponent's field has it.
    const V shifter = V{} + 12583039.0f;
    const V shifted = fused(z, V{} + 1.44269504f, shifter), multiple = shifted - shifter;
    const V r = fused(multiple, V{} - 1.42860677e-6f, fused(multiple, V{} - 0.693145752f, z)), square = r * r;
    const V low = fused(r, V{} + 1.666651289e-1f, 5.000000101e-1f);
    const V high = fused(r, V{} + 8.369598248e-3f, 4.166618729e-2f);
    p = fused(square, fused(square, fused(square, V{} + 1.395171768e-3f, high), low), r);
    n = bit_cast<I>(shifted) - bit_cast<I>(shifter);
  }
};

// e^z to about 1 ulp. 2^n as two powers overflows to inf and underflows to 0 by itself.
template <class V>
FASTMLP_INLINE V exponential(V z) {
  const Exponential<V> e(clamped(z, -105.0f, 89.0f));
  const auto half = e.n >> 1;
  return (e.p + 1.0f) * power_of_two<V>(half) * power_of_two<V>(e.n - half);
}

// e^z - 1 to about 1 ulp, which near 0 is p alone.
template <class V>
FASTMLP_INLINE V exponential_minus_1(V z) {
  const Exponential<V> e(clamped(z, -105.0f, 89.0f));
  const auto half = e.n >> 1;
  const V power = power_of_two<V>(half);
  return fused(e.p, power, power - power_of_two<V>(half - e.n)) * power_of_two<V>(e.n - half);
}

// log(1 + e) for 0 <= e <= 1 to about 1 ulp. It is 2 artanh(s) = 2 s + s r with s = e / (2 + e), the series of r to the
// 15th power (off by 1e-9 at most); and 2 s is e - s e, whose first term alone is not small (after fdlibm's log1p).
template <class V>
FASTMLP_INLINE V log_of_1_and(V e) {
  const V s = e / (e + 2.0f), t = s * s, half = 0.5f * e * e;
  const V r =
      t * polynomial(t, V{} + 2.0f / 15, 2.0f / 13, 2.0f / 11, 2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3);
  return e - fused(-s, half + r, half);
}

// 1 / (1 + e^-z)
template <class V>
FASTMLP_INLINE V logistic(V z) {
  return 1.0f / (1.0f + exponential(-z));
}

// tanh z for |z| <= 0.625: an odd minimax polynomial (relative error 4.1e-9).
template <class V>
FASTMLP_INLINE V tangent_near_0(V z) {
  const V t = z * z;
  return fused(z * t,
               polynomial(t, V{} - 5.717043313e-3f, 2.065058533e-2f, -5.374349729e-2f, 1.333149127e-1f,
                          -3.333328392e-1f),
               z);
}

// Elsewhere 1 + 2 h with h = -1 / (e^(2|z|) + 1), and |z| cut where the result is 1. One Newton step puts back what
// rounding has taken from the sum and from h. The cut is of integers, one instruction, which makes 10 of NaN: but NaN is
// not elsewhere.
template <class V>
FASTMLP_INLINE V hyperbolic_tangent(V z) {
  using I = typename Integer<V>::type;
  const I bits = bit_cast<I>(z), sign = bits & INT32_MIN, size_bits = bits ^ sign,
          ten = bit_cast<I>(V{} + 10.0f);
  const V size = bit_cast<V>(size_bits), cut = bit_cast<V>(size_bits < ten ? size_bits : ten);
  const Exponential<V> e(cut + cut);
  const V power = power_of_two<V>(e.n), whole = power + 1.0f, h = -1.0f / fused(e.p, power, whole);
  const V error = fused(h * power, e.p, fused(h, whole, 1.0f)),
          far = fused(fused(h, error, h), V{} + 2.0f, 1.0f);
  return bit_cast<V>(bit_cast<I>(size >= 0.625f ? far : tangent_near_0(size)) | sign);
}

// The standard normal distribution at z, and bell = e^(-z²/2), which is its density times √(2π).
//
// Near 0 it is 1/2 and an odd minimax polynomial (relative error 9.6e-9 up to 1.25). Beyond, the tail is the bell times
// a polynomial in k = 1 / (1 + 0.28 |z|), after Abramowitz and Stegun 26.2.17 (1.8e-8 up to 6, 9.2e-7 up to 14.5, where
// the bell ends). So the negative tail is exact to its own size, where 1 + erf(z / √2) is not.
template <class V>
FASTMLP_INLINE V normal_distribution(V z, V& bell) {
  const V size = z < 0.0f ? -z : z, t = z * z;
  bell = exponential(-0.5f * t);
  const V near_zero = fused(z,
                            polynomial(t, V{} - 6.80946244e-6f, 1.11041020e-4f, -1.18383702e-3f,
                                       9.97228265e-3f, -6.64902079e-2f, 3.98942277e-1f),
                            0.5f);
  const V k = 1.0f / fused(size, V{} + 0.28f, 1.0f);
  const V tail = bell * (k * polynomial(k, V{} - 5.98148548e-2f, 1.32289968e-1f, -4.46144097e-3f,
                                        1.10391958e-1f, 9.74914168e-2f, 1.12338005e-1f, 1.11673793e-1f));
  return size < 1.25f ? near_zero : (z < 0.0f ? tail : 1.0f - tail);
}

// ---- the table

enum class Reads { nothing, y, z };

struct Identity {
  FASTMLP_INLINE Reads reads() const { return Reads::nothing; }
  template <class V>
  FASTMLP_INLINE V operator()(V z) const {
    return z;
  }
  template <class V>
  FASTMLP_INLINE V gradient(V dy, V) const {
    return dy;
  }
};

struct Relu {
  FASTMLP_INLINE Reads reads() const { return Reads::y; }
  template <class V>
  FASTMLP_INLINE V operator()(V z) const {
    return z < 0.0f ? V{} : z;
  }
  template <class V>
  FASTMLP_INLINE V gradient(V dy, V y) const {
    return y <= 0.0f ? V{} : dy;
  }
};

// From y alone the two sides cannot be told apart where the slope is negative.
struct LeakyRelu {
  float slope;
  FASTMLP_INLINE Reads reads() const { return slope < 0.0f ? Reads::z : Reads::y; }
  template <class V>
  FASTMLP_INLINE V operator()(V z) const {
    return z > 0.0f ? z : slope * z;
  }
  template <class V>
  FASTMLP_INLINE V gradient(V dy, V saved) const {
    return saved > 0.0f ? dy : slope * dy;
  }
};

// ReLU6 too. The bounds are of the dtype of y, or g' at them is not found.
struct Hardtanh {
  float low, high;
  FASTMLP_INLINE Reads reads() const { return Reads::y; }
  template <class V>
  FASTMLP_INLINE V operator()(V z) const {
    return clamped(z, low, high);
  }
  template <class V>
  FASTMLP_INLINE V gradient(V dy, V y) const {
    return (y > low) & (y < high) ? dy : V{};
  }
};

// ELU, CELU and SELU, with the parameters of torch's elu:
//   ELU    (alpha, 1, 1)     CELU   (alpha, 1, 1 / alpha)     SELU   (1.6732632423543772, 1.0507009873554805, 1)
// g' = y + alpha would cancel where y is near -alpha, and so z is read.
struct Elu {
  float alpha, scale, input_scale;
  FASTMLP_INLINE Reads reads() const { return Reads::z; }
  template <class V>
  FASTMLP_INLINE V operator()(V z) const {
    const float below = alpha * scale;
    return z < 0.0f ? below * exponential_minus_1(z * input_scale) : scale * z;
  }
  template <class V>
  FASTMLP_INLINE V gradient(V dy, V z) const {
    const float below = alpha * scale;
    return z > 0.0f ? scale * dy : dy * input_scale * below * exponential(z * input_scale);
  }
};

struct Sigmoid {
  FASTMLP_INLINE Reads reads() const { return Reads::y; }
  template <class V>
  FASTMLP_INLINE V operator()(V z) const {
    return logistic(z);
  }
  template <class V>
  FASTMLP_INLINE V gradient(V dy, V y) const {
    return dy * (1.0f - y) * y;
  }
};

struct Tanh {
  FASTMLP_INLINE Reads reads() const { return Reads::y; }
  template <class V>
  FASTMLP_INLINE V operator()(V z) const {
    return hyperbolic_tangent(z);
  }
  template <class V>
  FASTMLP_INLINE V gradient(V dy, V y) const {
    return dy * fused(-y, y, 1.0f);
  }
};

// log(1 + e^βz) / β, and z itself above the threshold. Near a low one y does not tell on which side z is.
struct Softplus {
  float beta, threshold;
  FASTMLP_INLINE Reads reads() const { return Reads::z; }
  template <class V>
  FASTMLP_INLINE V operator()(V z) const {
    const V x = beta * z, smooth = (x < 0.0f ? V{} : x) + log_of_1_and(exponential(x < 0.0f ? x : -x));
    return x > threshold ? z : smooth / beta;
  }
  template <class V>
  FASTMLP_INLINE V gradient(V dy, V z) const {
    const V x = beta * z, e = exponential(x < 0.0f ? x : -x);
    return x > threshold ? dy : dy * ((x < 0.0f ? e : V{} + 1.0f) / (1.0f + e));
  }
};

struct Silu {
  FASTMLP_INLINE Reads reads() const { return Reads::z; }
  template <class V>
  FASTMLP_INLINE V operator()(V z) const {
    return z / (1.0f + exponential(-z));
  }
  template <class V>
  FASTMLP_INLINE V gradient(V dy, V z) const {
    const V s = logistic(z);
    return dy * s * fused(z, 1.0f - s, 1.0f);
  }
};

// z times the normal distribution.
struct Gelu {
  FASTMLP_INLINE Reads reads() const { return Reads::z; }
  template <class V>
  FASTMLP_INLINE V operator()(V z) const {
    V bell;
    return z * normal_distribution(z, bell);
  }
  template <class V>
  FASTMLP_INLINE V gradient(V dy, V z) const {
    V bell;
    const V p = normal_distribution(z, bell);
    return dy * fused(z, 0.398942280f * bell, p);
  }
};

// z s with s = (1 + tanh u) / 2 = 1 / (1 + e^-2u) and u = √(2/π) (z + 0.044715 z³).
struct GeluTanh {
  FASTMLP_INLINE Reads reads() const { return Reads::z; }
  template <class V>
  FASTMLP_INLINE V operator()(V z) const {
    V slope;
    return z * sigmoid_of_2(argument(z), slope);
  }
  template <class V>
  FASTMLP_INLINE V gradient(V dy, V z) const {
    V slope;
    const V s = sigmoid_of_2(argument(z), slope), u_slope = fused(z * z, V{} + 0.107032225f, 0.797884561f);
    return dy * fused(z * (slope + slope), u_slope, s);
  }

 private:
  template <class V>
  FASTMLP_INLINE V argument(V z) const {
    return z * fused(z * z, V{} + 0.0356774081f, 0.797884561f);
  }
  // s, and s (1 - s), in which nothing cancels.
  template <class V>
  FASTMLP_INLINE V sigmoid_of_2(V u, V& slope) const {
    const V size = u < 0.0f ? -u : u, e = exponential(-2.0f * size), larger = 1.0f / (1.0f + e),
            smaller = e * larger;
    slope = smaller * larger;
    return size < 0.625f ? fused(V{} + 0.5f, tangent_near_0(u), 0.5f) : (u < 0.0f ? smaller : larger);
  }
};

// z tanh(log(1 + e)) with e = e^z. The tanh is n / m with n = e (e + 2) and m = n + 2, or 1 - 2 / m where that is more
// exact, and its slope is 4 e (1 + e) / m².
struct Mish {
  FASTMLP_INLINE Reads reads() const { return Reads::z; }
  template <class V>
  FASTMLP_INLINE V operator()(V z) const {
    const V e = exponential(z > 20.0f ? V{} + 20.0f : z), n = fused(e, e, e + e);
    const V part = (z > 0.0f ? V{} - 2.0f : n) / (n + 2.0f);
    return z * (z > 0.0f ? 1.0f + part : part);
  }
  template <class V>
  FASTMLP_INLINE V gradient(V dy, V z) const {
    const V c = clamped(z, -105.0f, 20.0f), e = exponential(c), n = fused(e, e, e + e), m = n + 2.0f;
    const V below = e * fused(4.0f * c, e + 1.0f, (e + 2.0f) * m);
    const V above = fused(4.0f * c * e, e + 1.0f, -(m + m));
    const V part = (z > 0.0f ? above : below) / fused(n, n + 4.0f, 4.0f);
    return dy * (z > 0.0f ? 1.0f + part : part);
  }
};

struct Hardswish {
  FASTMLP_INLINE Reads reads() const { return Reads::z; }
  template <class V>
  FASTMLP_INLINE V operator()(V z) const {
    return z * (clamped(z + 3.0f, 0.0f, 6.0f) * (1.0f / 6));
  }
  template <class V>
  FASTMLP_INLINE V gradient(V dy, V z) const {
    const V inside = dy * (z / 3.0f + 0.5f);
    return z <= -3.0f ? V{} : z >= 3.0f ? dy : inside;
  }
};

// Next to the bounds y is rounded to 0 or 1, and so z is read.
struct Hardsigmoid {
  FASTMLP_INLINE Reads reads() const { return Reads::z; }
  template <class V>
  FASTMLP_INLINE V operator()(V z) const {
    return clamped(z + 3.0f, 0.0f, 6.0f) * (1.0f / 6);
  }
  template <class V>
  FASTMLP_INLINE V gradient(V dy, V z) const {
    return (z > -3.0f) & (z < 3.0f) ? dy * (1.0f / 6) : V{};
  }
};

#define FASTMLP_ACTIVATIONS(row)                                                                           \
  row(identity, Identity) row(relu, Relu) row(leaky_relu, LeakyRelu) row(hardtanh, Hardtanh) row(elu, Elu) \
      row(sigmoid, Sigmoid) row(tanh, Tanh) row(softplus, Softplus) row(silu, Silu) row(gelu, Gelu)        \
          row(gelu_tanh, GeluTanh) row(mish, Mish) row(hardswish, Hardswish) row(hardsigmoid, Hardsigmoid)

// ---- what is made of the table

enum Activation::Kind : int {
#define FASTMLP_ENUMERATOR(name, Type) name,
  FASTMLP_ACTIVATIONS(FASTMLP_ENUMERATOR)
};

template <class G>
FASTMLP_INLINE G with_parameters(const Activation& activation) {
  G g{};
  if constexpr (!std::is_empty_v<G>) __builtin_memcpy(&g, activation.parameters, sizeof(g));
  return g;
}

// Calls f(g) with the activation as an object of its type: a kernel is instantiated for each.
template <class F>
FASTMLP_INLINE auto with_activation(const Activation& activation, F f) {
  switch (activation.kind) {
#define FASTMLP_CASE(name, Type) \
  case Activation::name:         \
    return f(with_parameters<Type>(activation));
    FASTMLP_ACTIVATIONS(FASTMLP_CASE)
  }
  return f(Identity{});
}

FASTMLP_INLINE Reads reads(const Activation& activation) {
  return with_activation(activation, [](auto g) __attribute__((always_inline)) { return g.reads(); });
}

// Of one element, where the activation is known at run time alone.
#ifdef FASTMLP_EMULATE  // where many kernels are compiled, often
#define FASTMLP_OF_ONE inline __attribute__((noinline))
#else
#define FASTMLP_OF_ONE FASTMLP_INLINE
#endif
FASTMLP_OF_ONE float activated(const Activation& activation, float z) {
  return with_activation(activation, [&](auto g) { return g(z); });
}
FASTMLP_OF_ONE float differentiated(const Activation& activation, float dy, float saved) {
  return with_activation(activation, [&](auto g) { return g.gradient(dy, saved); });
}

}  // namespace fastmlp
