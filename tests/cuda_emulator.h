// CUDA's part of the language and of the runtime for plain g++, so that the kernel sources run on the CPU.
//
// Every CUDA thread is a fiber (ucontext), one block runs at a time, and a fiber runs until its next barrier.
// That shows what a GPU may hide: shared memory holds NaN before each block; the fibers of a block run
// forward, reversed or shuffled, so that a missing barrier gives wrong values; and a barrier that the threads
// of a block do not all reach makes the launch fail. Not thread-safe.
#pragma once

#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __CUDACC_VER_MAJOR__ 0
#define __CUDACC_VER_MINOR__ 0
#define __CUDA_ARCH_LIST__ 0
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// Thread-local only to lie in one segment that the emulator can find: all fibers share the host's one thread.
#define __shared__ static thread_local
#define __syncthreads() emulator::barrier(__LINE__)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

#ifdef __aarch64__  // where g++ has _Float16 in C++ from release 13 on only
using Float16 = __fp16;
#else
using Float16 = _Float16;
#endif

struct __half {
  Float16 value;
};
inline float __half2float(__half h) { return h.value; }
inline __half __float2half_rn(float f) { return {static_cast<Float16>(f)}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 b) {
  const uint32_t bits = uint32_t{b.bits} << 16;
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof(f));
  if (f != f) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

namespace emulator {

// The order of blocks, and of fibers between barriers: 0 forward, 1 reversed, else a seed to shuffle by.
inline unsigned order = 0;

constexpr size_t stack_bytes = 64 << 10;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  int barrier;  // the line of the barrier at which the fiber waits, 0 once it has ended

  void start(void (*entry)(), ucontext_t* next) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack.get();
    context.uc_stack.ss_size = stack_bytes;
    context.uc_link = next;
    makecontext(&context, entry, 0);
  }
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline Fiber* running;
inline void (*kernel_call)(void*);  // the kernel with its arguments bound
inline void* kernel_arguments;
inline thread_local char in_shared_memory;

inline void barrier(int line) {
  running->barrier = line;
  swapcontext(&running->context, &scheduler);
}

inline void fiber_main() {
  kernel_call(kernel_arguments);
  running->barrier = 0;
}

inline void poison_shared_memory() {
  in_shared_memory = 0;  // allocates the segment if nothing has yet
  dl_iterate_phdr(
      [](dl_phdr_info* module, size_t, void*) {
        char* const begin = static_cast<char*>(module->dlpi_tls_data);
        for (int i = 0; begin && i < module->dlpi_phnum; ++i) {
          const auto& segment = module->dlpi_phdr[i];
          const bool ours = begin <= &in_shared_memory && &in_shared_memory < begin + segment.p_memsz;
          if (segment.p_type == PT_TLS && ours) std::memset(begin, 0xff, segment.p_memsz);
        }
        return 0;
      },
      nullptr);
}

// Runs all threads of the block from barrier to barrier; false where they part ways.
inline bool run_block(unsigned threads) {
  for (unsigned t = 0; t < threads; ++t) fibers[t].start(fiber_main, &scheduler);
  std::mt19937 random(order);
  std::vector<unsigned> turn(threads);
  std::iota(turn.begin(), turn.end(), 0);
  if (order == 1) std::reverse(turn.begin(), turn.end());
  do {
    if (order > 1) std::shuffle(turn.begin(), turn.end(), random);
    for (unsigned t : turn) {
      threadIdx = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
      running = &fibers[t];
      swapcontext(&scheduler, &running->context);
    }
    for (unsigned t = 1; t < threads; ++t)
      if (fibers[t].barrier != fibers[0].barrier) return false;
  } while (fibers[0].barrier);
  return true;
}

}  // namespace emulator

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const uint64_t threads = uint64_t{blockDim.x} * blockDim.y * blockDim.z;
  const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  if (blocks == 0 || threads == 0 || threads > 1024 || gridDim.x > INT32_MAX || gridDim.y > 65535 ||
      gridDim.z > 65535)
    return cudaErrorInvalidConfiguration;
  auto call = [&] { kernel(arguments...); };
  emulator::kernel_call = [](void* bound) { (*static_cast<decltype(call)*>(bound))(); };
  emulator::kernel_arguments = &call;
  if (emulator::fibers.size() < threads) emulator::fibers = std::vector<emulator::Fiber>(threads);
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t block = emulator::order == 1 ? blocks - 1 - i : i;
    blockIdx = dim3(block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y);
    emulator::poison_shared_memory();
    if (!emulator::run_block(threads)) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}
