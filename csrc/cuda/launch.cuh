// CUDA as the kernel files see it: the toolkit, or on a machine without one the emulator of the tests; the
// element types; the launch; what the current device can run.
#pragma once

#ifdef FASTMLP_EMULATE
#include "cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <atomic>
#include <cstdint>

namespace fastmlp::cuda {

// The conversions by name: torch builds extensions with the implicit ones switched off.
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

__device__ __forceinline__ void store(float* p, float value) { *p = value; }
__device__ __forceinline__ void store(__nv_bfloat16* p, float value) { *p = __float2bfloat16_rn(value); }
__device__ __forceinline__ void store(__half* p, float value) { *p = __float2half_rn(value); }

// What is known of each device, by its number: 0 until it is written. Threads may find it out at the same time, since
// they find the same.
class Devices {
 public:
  char known(unsigned device) const {
    return device < most ? values[device].load(std::memory_order_acquire) : 0;
  }
  void keep(unsigned device, char value) {
    if (device < most) values[device].store(value, std::memory_order_release);
  }

 private:
  static constexpr unsigned most = 64;  // of a device beyond them it is found out every time
  std::atomic<char> values[most] = {};
};

// Whether there is code for a device, among what was built or by way of its PTX.
template <auto kernel>
bool has_code(int device) {
  enum Answer : char { unknown, yes, no };
  static Devices answers;
  if (const char answer = answers.known(device)) return answer == yes;
  int current = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  cudaSetDevice(current);
  if (error != cudaSuccess) cudaGetLastError();  // or the next who asks for it takes it for its own
  switch (error) {
    case cudaSuccess:
      answers.keep(device, yes);
      return true;
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidPtx:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
      answers.keep(device, no);
      return false;
    default:  // of no memory, say, or of a kernel that has failed before: not for ever
      return false;
  }
}

// Of a block on the current device, where a kernel asks for it; 0 where that cannot be known.
inline int64_t most_shared_memory() {
  int device = 0, bytes = 0;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess;
  return known ? bytes : 0;
}

// Asks for all the dynamic shared memory that a block of the kernel can have on the current device. Once, and never
// for less: another thread may be about to launch the kernel with as much.
template <auto kernel>
cudaError_t ask_for_shared_memory() {
  static Devices granted;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess || granted.known(device)) return error;
  cudaFuncAttributes own;
  error = cudaFuncGetAttributes(&own, kernel);
  if (error != cudaSuccess) return error;
  const int64_t most = most_shared_memory() - static_cast<int64_t>(own.sharedSizeBytes);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most));
  if (error == cudaSuccess) granted.keep(device, true);
  return error;
}

template <class... Parameters, class... Arguments>
cudaError_t enqueue(void (*kernel)(Parameters...), size_t shared_bytes, int64_t blocks, unsigned threads,
                    cudaStream_t stream, Arguments... arguments) {
  if (blocks == 0) return cudaSuccess;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Enqueues kernel(args...), or nothing for a grid of no blocks, which CUDA itself refuses. The error is this
// launch's own: one that somebody left behind earlier is neither returned nor cleared.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, unsigned threads, cudaStream_t stream,
                   Arguments... arguments) {
  return enqueue(kernel, 0, blocks, threads, stream, arguments...);
}

// The same with dynamic shared memory.
template <auto kernel, class... Arguments>
cudaError_t launch_with(size_t shared_bytes, int64_t blocks, unsigned threads, cudaStream_t stream,
                        Arguments... arguments) {
  const cudaError_t error = ask_for_shared_memory<kernel>();
  return error == cudaSuccess ? enqueue(kernel, shared_bytes, blocks, threads, stream, arguments...) : error;
}

// The same with all blocks there at once, so that they may wait for one another; an error where there is no room.
template <auto kernel, class... Arguments>
cudaError_t launch_together(size_t shared_bytes, int64_t blocks, unsigned threads, cudaStream_t stream,
                            Arguments... arguments) {
  int device = 0, multiprocessors = 0, on_each = 0;
  cudaError_t error = ask_for_shared_memory<kernel>();
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&on_each, kernel, int(threads), shared_bytes);
  if (error != cudaSuccess) return error;
  if (blocks < 1 || blocks > int64_t{on_each} * multiprocessors) return cudaErrorCooperativeLaunchTooLarge;
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace fastmlp::cuda
