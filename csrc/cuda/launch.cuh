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

// A launch begins while the kernel before it in the stream ends, on sm_90 and later. So every kernel waits, in all threads,
// before it touches global memory, even to write: another kernel may still read there. That kernel has ended then with
// all before it, since it has waited too.
__device__ __forceinline__ void wait_for_previous() {
#if defined(FASTMLP_EMULATE) || __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Blocks of the next kernel may come, to the room that is left, once all blocks of this one are here or have ended. Where
// what is left to do takes about as long as a launch: early, they would be too many where there is room, and wait there.
__device__ __forceinline__ void let_next_begin() {
#if defined(FASTMLP_EMULATE) || __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// What is known of each device, by its number. Threads may find it out at the same time, since they find the same.
enum Answer : char { unknown, yes, no };
class Devices {
 public:
  Answer known(unsigned device) const {
    return device < most ? answers[device].load(std::memory_order_acquire) : unknown;
  }
  void keep(unsigned device, Answer answer) {
    if (device < most) answers[device].store(answer, std::memory_order_release);
  }

 private:
  static constexpr unsigned most = 64;  // of a device beyond them it is found out every time
  std::atomic<Answer> answers[most] = {};
};

// Whether there is code for a device, among what was built or by way of its PTX.
template <auto kernel>
bool has_code(int device) {
  static Devices answers;
  if (const Answer answer = answers.known(device)) return answer == yes;
  int current = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  cudaSetDevice(current);
  if (error != cudaSuccess) cudaGetLastError();  // or the next who asks for it takes it for its own
  // An error of no memory, say, or of a kernel that has failed before, is not for ever.
  constexpr cudaError_t for_ever[] = {cudaSuccess,
                                      cudaErrorInvalidDeviceFunction,
                                      cudaErrorInvalidKernelImage,
                                      cudaErrorNoKernelImageForDevice,
                                      cudaErrorInvalidPtx,
                                      cudaErrorUnsupportedPtxVersion,
                                      cudaErrorJitCompilerNotFound,
                                      cudaErrorJitCompilationDisabled};
  for (const cudaError_t known : for_ever)
    if (error == known) answers.keep(device, error == cudaSuccess ? yes : no);
  return error == cudaSuccess;
}

// Of the current device; 0 where it cannot be known.
inline int device_attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, which, device) == cudaSuccess;
  return known ? value : 0;
}

// Of a block, where a kernel asks for it.
inline int64_t most_shared_memory() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// Before the first launch of a kernel on the current device: asks for all the dynamic shared memory that its blocks can
// have, and never for less, since another thread may be about to launch it with as much. `overlaps`: whether launches may
// begin early. Their code has to wait then, and a driver that captures them in graphs is of CUDA 12.3 or later.
template <auto kernel>
cudaError_t prepare(bool& overlaps) {
  static Devices answers;
  int device = 0, driver = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  Answer answer = answers.known(device);
  if (answer == unknown) {
    cudaFuncAttributes own;
    error = cudaFuncGetAttributes(&own, kernel);
    if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
    if (error != cudaSuccess) return error;
    const int64_t most = most_shared_memory() - static_cast<int64_t>(own.sharedSizeBytes);
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most));
    if (error != cudaSuccess) return error;
    answers.keep(device, answer = own.ptxVersion >= 90 && driver >= 12030 ? yes : no);
  }
  overlaps = answer == yes;
  return cudaSuccess;
}

// Enqueues kernel(arguments...) with dynamic shared memory, or nothing for a grid of no blocks, which CUDA itself refuses.
// `together`: with all blocks there at once, so that they may wait for one another, when all before it has ended; an error
// where there is no room. The error is this launch's own: one that somebody left behind earlier is neither returned nor
// cleared.
template <auto kernel, bool together = false, class... Arguments>
cudaError_t launch_with(size_t shared_bytes, int64_t blocks, unsigned threads, cudaStream_t stream,
                        Arguments... arguments) {
  bool overlaps = false;
  if (blocks == 0 && !together) return cudaSuccess;
  if (const cudaError_t error = prepare<kernel>(overlaps); error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id =
      together ? cudaLaunchAttributeCooperative : cudaLaunchAttributeProgrammaticStreamSerialization;
  (together ? attribute.val.cooperative : attribute.val.programmaticStreamSerializationAllowed) = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = together || overlaps;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <auto kernel, class... Arguments>
cudaError_t launch(int64_t blocks, unsigned threads, cudaStream_t stream, Arguments... arguments) {
  return launch_with<kernel>(0, blocks, threads, stream, arguments...);
}

}  // namespace fastmlp::cuda
