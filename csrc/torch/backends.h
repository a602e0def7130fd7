// The border to the backends, seen from torch: where tensors live, which stream or threads work runs on, what is
// raised. The op kernels are templates over Cpu and Cuda.
#pragma once

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>
#include <sys/mman.h>

#include <algorithm>
#include <vector>

#include "../kernels.h"

#ifdef FASTMLP_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace fastmlp {

struct Cpu {
  static int64_t workspace(const Forward* layers, int64_t count) {
    return cpu::forward_workspace(layers, count, at::get_num_threads());
  }
  static int64_t workspace(const Backward* layers, int64_t count) {
    return cpu::backward_workspace(layers, count, at::get_num_threads());
  }
  static void run(const Forward* layers, int64_t count, void* workspace) {
    cpu::forward(layers, count, workspace, at::get_num_threads());
  }
  static void run(const Backward* layers, int64_t count, void* workspace) {
    cpu::backward(layers, count, workspace, at::get_num_threads());
  }
  static int64_t workspace(const CrossEntropy* p, int64_t) { return cpu::cross_entropy_workspace(*p); }
  static void run(const CrossEntropy* p, int64_t, void* workspace) {
    const int64_t wrong = cpu::cross_entropy(*p, workspace, at::get_num_threads());
    TORCH_CHECK_INDEX(wrong < 0, "Target ", p->target[wrong], " is out of bounds.");
  }
  static void run(const Optimizer& optimizer, const Update* updates, int64_t count) {
    cpu::optimize(optimizer, updates, count, at::get_num_threads());
  }
  static int64_t workspace(const Clip&, const Gradient*, int64_t) { return 0; }
  static void run(const Clip& clip, const Gradient* gradients, int64_t count, void*) {
    cpu::clip(clip, gradients, count, at::get_num_threads());
  }
};

#ifdef FASTMLP_WITH_CUDA
struct Cuda {
  static int64_t workspace(const Forward* layers, int64_t count) {
    return cuda::forward_workspace(layers, count);
  }
  static int64_t workspace(const Backward* layers, int64_t count) {
    return cuda::backward_workspace(layers, count);
  }
  static void run(const Forward* layers, int64_t count, void* workspace) {
    check(cuda::forward(layers, count, workspace, c10::cuda::getCurrentCUDAStream().stream()));
  }
  static void run(const Backward* layers, int64_t count, void* workspace) {
    check(cuda::backward(layers, count, workspace, c10::cuda::getCurrentCUDAStream().stream()));
  }
  static int64_t workspace(const CrossEntropy* p, int64_t) { return cuda::cross_entropy_workspace(*p); }
  static void run(const CrossEntropy* p, int64_t, void* workspace) {
    check(cuda::cross_entropy(*p, workspace, c10::cuda::getCurrentCUDAStream().stream()));
  }
  static void run(const Optimizer& optimizer, const Update* updates, int64_t count) {
    check(cuda::optimize(optimizer, updates, count, c10::cuda::getCurrentCUDAStream().stream()));
  }
  static int64_t workspace(const Clip& clip, const Gradient* gradients, int64_t count) {
    return cuda::clip_workspace(clip, gradients, count);
  }
  static void run(const Clip& clip, const Gradient* gradients, int64_t count, void* workspace) {
    check(cuda::clip(clip, gradients, count, workspace, c10::cuda::getCurrentCUDAStream().stream()));
  }

 private:
  static void check(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }
};
#endif

// A tensor to be written. The system gives large blocks as new pages in every step, and 4 KiB at a time their faults
// cost as much as a product: huge pages are asked for, where it leaves that to programs.
inline at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  constexpr uintptr_t huge = 2 << 20;
  at::Tensor t =
      options.device().is_cpu() ? at::detail::empty_cpu(sizes, options) : at::empty(sizes, options);
#ifdef MADV_HUGEPAGE
  if (t.is_cpu() && t.nbytes() >= 2 * huge) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr()), end = begin + t.nbytes();
    const uintptr_t first = (begin + huge - 1) / huge * huge, last = end / huge * huge;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return t;
}

// Runs the layers of a network, or a loss, with memory of the allocator of `like` to work in.
template <class Device, class Layer>
void run(const Layer* layers, int64_t count, const at::Tensor& like) {
  const int64_t bytes = Device::workspace(layers, count);
  const at::Tensor workspace = bytes ? empty({bytes}, like.options().dtype(at::kByte)) : at::Tensor();
  Device::run(layers, count, bytes ? workspace.mutable_data_ptr() : nullptr);
}

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

// Whether float32 may be multiplied in less precision: torch's own settings for its library's products, which are
// bfloat16 on the CPU and TF32 on a GPU.
inline bool is_reduced_on(at::DeviceType device) {
  using at::Float32Backend, at::Float32Op, at::Float32Precision;
  const auto is_set = [](Float32Backend backend, Float32Precision precision) {
    return at::globalContext().float32Precision(backend, Float32Op::MATMUL) == precision;
  };
  return device == at::kCUDA ? is_set(Float32Backend::CUDA, Float32Precision::TF32)
                             : device == at::kCPU && is_set(Float32Backend::MKLDNN, Float32Precision::BF16);
}
inline bool is_reduced(const at::Tensor& t) { return is_reduced_on(t.device().type()); }

// The tensor as a matrix [rows, columns] with adjacent columns: itself where its strides allow, else a copy.
inline at::Tensor as_matrix(const at::Tensor& t, int64_t rows, int64_t columns) {
  const at::Tensor matrix = t.dim() == 2 ? t : t.reshape({rows, columns});
  return columns <= 1 || matrix.stride(1) == 1 ? matrix : matrix.contiguous();
}

// Where a tensor is, from its first element to its last, with all that lies between.
struct Memory {
  const char *begin, *end;
};
inline Memory memory_of(const at::Tensor& t) {
  if (!t.defined() || t.numel() == 0) return {nullptr, nullptr};
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  const char* const begin = static_cast<const char*>(t.const_data_ptr());
  return {begin, begin + (last + 1) * int64_t(t.element_size())};
}

using Memories = c10::SmallVector<Memory, 32>;

// Whether any two share memory: what is written would then depend on who comes first.
inline bool overlap(Memories memories) {
  const auto is_empty = [](Memory m) { return m.begin == m.end; };
  memories.erase(std::remove_if(memories.begin(), memories.end(), is_empty), memories.end());
  std::sort(memories.begin(), memories.end(), [](Memory a, Memory b) { return a.begin < b.begin; });
  return std::adjacent_find(memories.begin(), memories.end(),
                            [](Memory a, Memory b) { return b.begin < a.end; }) != memories.end();
}

// How many rows the input has, all but the last dimension taken together.
inline int64_t rows_of(const at::Tensor& input) {
  return c10::multiply_integers(input.sizes().slice(0, input.dim() - 1));
}

}  // namespace fastmlp
