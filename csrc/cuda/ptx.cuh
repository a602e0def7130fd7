// The instructions that C++ has no name for, as functions: copies that go on while a thread computes, and tensor
// cores. All of sm_80 and later. The emulator of the tests has functions of the same meaning.
#pragma once

#include <type_traits>

#include "launch.cuh"

namespace fastmlp::cuda::ptx {

#ifdef FASTMLP_EMULATE
using emulator::arrive;
using emulator::commit_copies;
using emulator::copy_async;
using emulator::load_matrices;
using emulator::multiply_matrices;
using emulator::round_to_tf32;
using emulator::wait;
using emulator::wait_for_copies;

inline unsigned char* dynamic_shared_memory() { return emulator::own.dynamic_memory; }
#else

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// Copies 4, 8 or 16 bytes to shared memory, or fills them with 0. All pointers are multiples of `bytes`. What is copied
// can be read after wait_for_copies(), and by other threads after a barrier too.
template <int bytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
#define FASTMLP_COPY(cached)                                                         \
  asm volatile("{.reg .pred outside; setp.eq.s32 outside, %2, 0; cp.async." cached   \
               ".shared.global [%0], [%1], %3, outside;}" ::"r"(shared_address(to)), \
               "l"(from), "r"(int(inside)), "n"(bytes)                               \
               : "memory")
  if constexpr (bytes == 16) FASTMLP_COPY("cg");
  else FASTMLP_COPY("ca");
#undef FASTMLP_COPY
}

// Makes a group of the thread's copies since the last.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all of the thread's groups but the last `left` have arrived.
template <int left>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// Four 8 x 8 matrices of 16 bits. Lane 8 i + j gives the address of row j of matrix i, and gets of each matrix the
// elements 2 (lane % 4) and the next of row lane / 4; transposed, of the column.
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

#define FASTMLP_MMA(shape, type)                                                      \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// sums [16, 8] += a [16, k] b [k, 8], with k = 16 or, of float, which is multiplied as tf32, 8.
template <class T>
__device__ __forceinline__ void multiply_matrices(float (&sums)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 4) FASTMLP_MMA("m16n8k8", "tf32");
  else if constexpr (std::is_same_v<T, __half>) FASTMLP_MMA("m16n8k16", "f16");
  else FASTMLP_MMA("m16n8k16", "bf16");
}

#undef FASTMLP_MMA

__device__ __forceinline__ uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "r"(bits));
  return rounded;
}

// Adds to what other blocks wait for, and returns what it was: all that the block has written before a barrier of its own
// is there for those who have waited.
__device__ __forceinline__ unsigned arrive(unsigned* arrived, unsigned count) {
  unsigned before;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(arrived), "r"(count)
               : "memory");
  return before;
}

// Until the highest bit is another than it was.
__device__ __forceinline__ void wait(const unsigned* arrived, unsigned before) {
  unsigned now;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrived) : "memory");
  while (!((now ^ before) & 0x80000000u));
}
#endif

}  // namespace fastmlp::cuda::ptx
