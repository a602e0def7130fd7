// Clipping by the norm of all gradients: `square` leaves the sum of squares of each block's elements, `combine` makes the
// norm and the factor of these sums, `scale` multiplies by it. Bound by bandwidth, and where gradients are small by the
// latency of three launches. The sums are in float64, in an order that the sizes alone decide.
#pragma once

#include <cmath>

#include "../optimizer.h"
#include "across.cuh"
#include "tensors.cuh"

namespace fastmlp::cuda::clipping {

constexpr int threads = most_threads;
constexpr int packs = 4;                 // of a thread's, one after the other
using Gradients = Table<Gradient, 160>;  // arguments end at 4096 bytes

template <class T>
constexpr int64_t elements_of_block = int64_t{threads} * packs * Pack<T>::size;

// Calls f(p, n, aligned) for each of the thread's packs: n elements are left at p.
template <class T, class F>
__device__ __forceinline__ void for_packs(const Gradients& table, F f) {
  const int tensor = table.tensor_of(blockIdx.x);
  const int64_t size = table.tensors[tensor].size;
  T* const g = static_cast<T*>(table.tensors[tensor].data);
  const bool aligned = is_aligned<T>(reinterpret_cast<uintptr_t>(g));
  int64_t i = (blockIdx.x - table.first_block[tensor]) * elements_of_block<T> + threadIdx.x * Pack<T>::size;
  for (int p = 0; p < packs && i < size; ++p, i += threads * Pack<T>::size) f(g + i, size - i, aligned);
}

template <class T>
__global__ void __launch_bounds__(threads) square(const Gradients table, double* sums) {
  wait_for_previous(), let_next_begin();
  double sum = 0;
  for_packs<T>(table, [&](const T* p, int64_t n, bool aligned) {
    const Pack<T> pack = load(p, n, aligned);
    for (int j = 0; j < Pack<T>::size; ++j) {
      const double g = to_float(pack.elements[j]);
      sum += g * g;
    }
  });
  sum = across<Sum>(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(threads)
    combine(const Clip c, const double* sums, int64_t count, float* factor) {
  wait_for_previous(), let_next_begin();
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += threads) sum += sums[i];
  sum = across<Sum>(sum);
  if (threadIdx.x > 0) return;
  T* const norm = static_cast<T*>(c.norm);
  store(norm, float(sqrt(sum)));
  const float stored = to_float(*norm);
  *factor = factor_of(c, sqrt(sum), stored - stored == 0.0f);
}

template <class T>
__global__ void __launch_bounds__(threads) scale(const Gradients table, const float* factor_) {
  wait_for_previous(), let_next_begin();
  const float factor = *factor_;
  if (factor == 1.0f) return;
  for_packs<T>(table, [&](T* p, int64_t n, bool aligned) {
    Pack<T> pack = load(p, n, aligned);
    for (int j = 0; j < Pack<T>::size; ++j) store(&pack.elements[j], factor * to_float(pack.elements[j]));
    store(p, pack, n, aligned);
  });
}

// All blocks of `square`.
template <class T>
int64_t blocks(const Gradient* gradients, int64_t count) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i) blocks += blocks_of(gradients[i].size, elements_of_block<T>);
  return blocks;
}

// A sum for each of them, and the factor.
template <class T>
int64_t workspace(const Gradient* gradients, int64_t count) {
  return (blocks<T>(gradients, count) + 1) * int64_t{sizeof(double)};
}

// `square` and `scale` are launched once for every 160 gradients.
template <class T>
cudaError_t run(const Clip& c, const Gradient* gradients, int64_t count, double* sums, cudaStream_t stream) {
  const int64_t all = blocks<T>(gradients, count);
  float* const factor = reinterpret_cast<float*>(sums + all);
  double* own = sums;
  cudaError_t error = for_tables<Gradients>(
      gradients, count, elements_of_block<T>, [&](const Gradients& table, int64_t blocks) {
        own += blocks;
        return launch<square<T>>(blocks, threads, stream, table, own - blocks);
      });
  if (error == cudaSuccess) error = launch<combine<T>>(1, threads, stream, c, sums, all, factor);
  if (error != cudaSuccess) return error;
  return for_tables<Gradients>(gradients, count, elements_of_block<T>,
                               [&](const Gradients& table, int64_t blocks) {
                                 return launch<scale<T>>(blocks, threads, stream, table, factor);
                               });
}

}  // namespace fastmlp::cuda::clipping
