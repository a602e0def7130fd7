// The border to the backends, seen from torch: where tensors live, which stream or threads work runs on, what is
// raised. The op kernels are templates over Cpu and Cuda.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "../kernels.h"

#ifdef FASTMLP_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace fastmlp {

struct Cpu {
  static void run(const Forward* layers, int64_t count) {
    cpu::forward(layers, count, at::get_num_threads());
  }
  static void run(const Backward* layers, int64_t count) {
    cpu::backward(layers, count, at::get_num_threads());
  }
  static int64_t workspace(const Backward& p) { return cpu::backward_workspace(p); }
};

#ifdef FASTMLP_WITH_CUDA
struct Cuda {
  static int enqueue(const Forward& p, void* stream) { return cuda::forward(p, stream); }
  static int enqueue(const Backward& p, void* stream) { return cuda::backward(p, stream); }
  template <class Layer>
  static void run(const Layer* layers, int64_t count) {
    void* const stream = c10::cuda::getCurrentCUDAStream().stream();
    for (int64_t i = 0; i < count; ++i) C10_CUDA_CHECK(static_cast<cudaError_t>(enqueue(layers[i], stream)));
  }
  static int64_t workspace(const Backward& p) { return cuda::backward_workspace(p); }
};
#endif

inline Dtype dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kBFloat16:
      return Dtype::bfloat16;
    case at::kHalf:
      return Dtype::float16;
    default:
      return Dtype::float32;
  }
}

// The tensor as a matrix [rows, columns] with adjacent columns: itself where its strides allow, else a copy.
inline at::Tensor as_matrix(const at::Tensor& t, int64_t rows, int64_t columns) {
  const at::Tensor matrix = t.dim() == 2 ? t : t.reshape({rows, columns});
  return columns <= 1 || matrix.stride(1) == 1 ? matrix : matrix.contiguous();
}

// How many rows the input has, all but the last dimension taken together.
inline int64_t rows_of(const at::Tensor& input) {
  return c10::multiply_integers(input.sizes().slice(0, input.dim() - 1));
}

}  // namespace fastmlp
