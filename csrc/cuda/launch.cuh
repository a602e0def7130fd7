// CUDA as the kernel files see it: the toolkit, or on a machine without one the emulator of the tests; the
// element types; the launch.
#pragma once

#ifdef FASTMLP_EMULATE
#include "cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>

namespace fastmlp::cuda {

// The conversions by name: torch builds extensions with the implicit ones switched off.
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

__device__ __forceinline__ void store(float* p, float value) { *p = value; }
__device__ __forceinline__ void store(__nv_bfloat16* p, float value) { *p = __float2bfloat16_rn(value); }
__device__ __forceinline__ void store(__half* p, float value) { *p = __float2half_rn(value); }

// Elements that are loaded and stored at once: 16 bytes.
template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T elements[size];
};

// Enqueues kernel(args...), or nothing for a grid of no blocks, which CUDA itself refuses. The error is this
// launch's own: one that somebody left behind earlier is neither returned nor cleared.
template <class... Parameters, class... Arguments>
cudaError_t launch_with(size_t shared_bytes, void (*kernel)(Parameters...), int64_t blocks, unsigned threads,
                        cudaStream_t stream, Arguments... arguments) {
  constexpr size_t granted = 48 << 10;  // of dynamic shared memory; more has to be asked for
  if (blocks == 0) return cudaSuccess;
  if (shared_bytes > granted) {
    const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(kernel, most, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, unsigned threads, cudaStream_t stream,
                   Arguments... arguments) {
  return launch_with(0, kernel, blocks, threads, stream, arguments...);
}

}  // namespace fastmlp::cuda
