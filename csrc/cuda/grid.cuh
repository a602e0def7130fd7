// A barrier of all blocks of a launch, which is `together`: they are there at once. What a block has written before it
// arrives, others read once they have waited. Between the two it may do what others need not wait for.
#pragma once

#include "ptx.cuh"

namespace fastmlp::cuda {

// `arrived` is 0 before its first use, and may then be used by launches of any number of blocks, one after the other: the
// first block adds what makes the highest bit change, and no other, when all others have added 1.
class Grid {
 public:
  explicit __device__ __forceinline__ Grid(unsigned* arrived) : arrived(arrived), before(0) {}
  __device__ __forceinline__ void arrive() {
    __syncthreads();
    if (threadIdx.x == 0 && gridDim.x > 1)
      before = ptx::arrive(arrived, blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u);
  }
  __device__ __forceinline__ void wait() {
    if (threadIdx.x == 0 && gridDim.x > 1) ptx::wait(arrived, before);
    __syncthreads();
  }
  __device__ __forceinline__ void synchronize() { arrive(), wait(); }

 private:
  unsigned *arrived, before;
};

}  // namespace fastmlp::cuda
