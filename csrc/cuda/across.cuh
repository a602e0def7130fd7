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

// Those who share work, with the same operation over all of them: the threads of a block, or of a warp.
struct Block {
  static __device__ __forceinline__ unsigned rank() { return threadIdx.x; }
  static __device__ __forceinline__ unsigned size() { return blockDim.x; }
  template <class Op, class V>
  static __device__ __forceinline__ V across(V value) {
    return cuda::across<Op>(value);
  }
};
struct Warp {
  static __device__ __forceinline__ unsigned rank() { return threadIdx.x % 32; }
  static constexpr __device__ __forceinline__ unsigned size() { return 32; }
  template <class Op, class V>
  static __device__ __forceinline__ V across(V value) {
    for (int step = 16; step > 0; step /= 2) value = Op::of(value, __shfl_xor_sync(0xffffffff, value, step));
    return value;
  }
};

}  // namespace fastmlp::cuda
