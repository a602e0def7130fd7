// A sum, or another operation, over the threads of a block, in an order that their number alone decides.
#pragma once

#include "launch.cuh"

namespace fastmlp::cuda {

constexpr int most_threads = 256;  // of the block, a power of 2

struct Larger {
  static __device__ __forceinline__ float of(float a, float b) { return a > b ? a : b; }  // b where a is NaN
};
struct Sum {
  template <class V>
  static __device__ __forceinline__ V of(V a, V b) {
    return a + b;
  }
};

// For every thread, Op over all threads of the block. Each of them must call it.
template <class Op, class V>
__device__ __forceinline__ V across(V value) {
  __shared__ V values[most_threads];
  __syncthreads();
  values[threadIdx.x] = value;
  for (unsigned step = blockDim.x / 2; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.x < step) values[threadIdx.x] = Op::of(values[threadIdx.x], values[threadIdx.x + step]);
  }
  __syncthreads();
  return values[0];
}

}  // namespace fastmlp::cuda
