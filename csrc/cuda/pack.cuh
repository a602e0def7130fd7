// Elements that are loaded, changed and stored at once: 16 bytes.
#pragma once

#include "../activation.h"
#include "launch.cuh"

namespace fastmlp::cuda {

template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T elements[size];
};

template <class T>
__device__ __forceinline__ bool is_aligned(uintptr_t addresses) {  // joined by "or"
  return addresses % sizeof(Pack<T>) == 0;
}

// The first n elements at p, whole where n is at least a pack's size and p is aligned; then zeros.
template <class T>
__device__ __forceinline__ Pack<T> load(const T* p, int64_t n, bool aligned) {
  if (aligned && n >= Pack<T>::size) return *reinterpret_cast<const Pack<T>*>(p);
  Pack<T> pack{};
  for (int j = 0; j < Pack<T>::size; ++j)
    if (j < n) pack.elements[j] = p[j];
  return pack;
}

template <class T>
__device__ __forceinline__ void store(T* p, const Pack<T>& pack, int64_t n, bool aligned) {
  if (aligned && n >= Pack<T>::size) {
    *reinterpret_cast<Pack<T>*>(p) = pack;
    return;
  }
  for (int j = 0; j < Pack<T>::size; ++j)
    if (j < n) p[j] = pack.elements[j];
}

// Neighbours at once.
template <class T, int n>
__device__ __forceinline__ void store(T* p, const float (&values)[n]) {
  struct alignas(n * sizeof(T)) {
    T elements[n];
  } all;
#pragma unroll
  for (int e = 0; e < n; ++e) store(&all.elements[e], values[e]);
  *reinterpret_cast<decltype(all)*>(p) = all;
}

// ---- activations: which one it is, all threads ask at once
//
// The simple ones are unrolled code. The others are long: they are there once, for the first element, and all move up by
// one place in turn.

__host__ __device__ __forceinline__ bool is_simple(const Activation& g) {
  return g.kind == Activation::identity || g.kind == Activation::relu;
}

// All move up by one place, and `last` takes the last.
template <class T>
__device__ __forceinline__ void rotate(Pack<T>& pack, float last) {
#pragma unroll
  for (int e = 0; e + 1 < Pack<T>::size; ++e) pack.elements[e] = pack.elements[e + 1];
  store(&pack.elements[Pack<T>::size - 1], last);
}

// y for z.
template <bool simple, class T>
__device__ __forceinline__ void activate(Pack<T>& z, const Activation& g) {
  if constexpr (simple) {
#pragma unroll
    for (T& element : z.elements)
      if (g.kind == Activation::relu) store(&element, Relu{}(to_float(element)));
  } else {
#pragma unroll 1
    for (int e = 0; e < Pack<T>::size; ++e) rotate(z, activated(g, to_float(z.elements[0])));
  }
}

// dz for dy, and y for what is saved, where that is wanted.
template <bool simple, class T>
__device__ __forceinline__ void differentiate(Pack<T>& dy, Pack<T>& saved, const Activation& g,
                                              bool activates) {
  if constexpr (simple) {
#pragma unroll
    for (int e = 0; e < Pack<T>::size; ++e)
      if (g.kind == Activation::relu)
        store(&dy.elements[e], Relu{}.gradient(to_float(dy.elements[e]), to_float(saved.elements[e])));
    if (activates) activate<simple>(saved, g);
  } else {
#pragma unroll 1
    for (int e = 0; e < Pack<T>::size; ++e) {
      const float own = to_float(saved.elements[0]);
      rotate(dy, differentiated(g, to_float(dy.elements[0]), own));
      rotate(saved, activates ? activated(g, own) : 0.0f);
    }
  }
}

}  // namespace fastmlp::cuda
