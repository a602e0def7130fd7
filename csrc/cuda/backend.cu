// The CUDA backend: picks the kernels for a call and enqueues them.
#include <algorithm>
#include <type_traits>

#include "../activation.h"
#include "../kernels.h"
#include "launch.cuh"
#include "product.cuh"
#include "simt.cuh"
#include "softmax.cuh"
#include "tensor_core.cuh"
#include "update.cuh"

#define FASTMLP_TEXT_OF(...) #__VA_ARGS__
#define FASTMLP_TEXT(...) FASTMLP_TEXT_OF(__VA_ARGS__)

namespace fastmlp::cuda {

namespace {

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) with the dtype as a type.
template <class F>
auto with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::bfloat16:
      return f(Type<__nv_bfloat16>{});
    case Dtype::float16:
      return f(Type<__half>{});
    default:
      return f(Type<float>{});
  }
}

// Bytes of a matrix in the workspace, in whole cache lines.
int64_t matrix_bytes(Dtype dtype, int64_t rows, int64_t columns) {
  return (rows * columns * (dtype == Dtype::float32 ? 4 : 2) + 63) / 64 * 64;
}

// What only the next layer reads: two buffers in turn, at the beginning of the workspace.
int64_t between_bytes(const Forward* layers, int64_t count) {
  int64_t widest = 0;
  for (int64_t i = 0; i < count; ++i)
    if (!layers[i].y) widest = std::max(widest, layers[i].N);
  return matrix_bytes(layers->dtype, layers->M, widest);
}
int64_t between_bytes(const Backward* layers, int64_t count) {
  int64_t widest = 0;
  for (int64_t i = 0; i + 1 < count; ++i) widest = std::max(widest, layers[i].K);
  return matrix_bytes(layers->dtype, layers->M, widest);
}

// ---- the choice of kernels
//
//   bfloat16, float16              tensor cores, on sm_80 to sm_120 by the same instructions
//   float32                        multiply-adds
//   float32 where reduced          tensor cores, as tf32
//
//   tiles of 128 x 128             where they, with splits of 16 steps or more, are enough for all multiprocessors
//   tiles of 64 x 64               otherwise, with splits of 8 steps or more

using Large = Tiling<128, 128, 64, 32, 3, 1>;
using Small = Tiling<64, 64, 32, 32, 4, 3>;

// Of a large GPU. The number is fixed, so that a sum is split, and rounded, in the same way on every GPU.
#ifndef FASTMLP_MULTIPROCESSORS
#define FASTMLP_MULTIPROCESSORS 128
#endif
constexpr int64_t multiprocessors = FASTMLP_MULTIPROCESSORS;

Cut cut(Dtype dtype, int64_t rows, int64_t columns, int64_t K) {
  const int64_t steps = K * (dtype == Dtype::float32 ? 4 : 2) / 64;
  const auto tiles = [&](int64_t size) { return ((rows + size - 1) / size) * ((columns + size - 1) / size); };
  const bool large = tiles(Large::m) * std::max<int64_t>(steps / 16, 1) >= multiprocessors;
  const int64_t own = std::max<int64_t>(tiles(large ? Large::m : Small::m), 1);
  const int64_t most = std::max<int64_t>(steps / (large ? 16 : 8), 1);
  return {large, std::clamp<int64_t>(multiprocessors / own, 1, most)};
}

// Bytes of the splits' sums.
int64_t split_bytes(Dtype dtype, int64_t rows, int64_t columns, int64_t K) {
  const int64_t splits = cut(dtype, rows, columns, K).splits;
  return splits > 1
             ? splits * Result<float>{.rows = rows, .columns = columns}.stride() * int64_t{sizeof(float)}
             : 0;
}
int64_t split_bytes(const Forward& f) { return split_bytes(f.dtype, f.M, f.N, f.K); }
int64_t split_bytes(const Backward& b) {  // does not depend on which outputs are asked for
  return std::max(split_bytes(b.dtype, b.M, b.K, b.N), split_bytes(b.dtype, b.N, b.K, b.M));
}

// One layer after the other uses the same memory for them.
template <class Layer>
int64_t largest_split(const Layer* layers, int64_t count) {
  int64_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, split_bytes(layers[i]));
  return largest;
}

// Bytes of the widest copies that an address and a stride are multiples of.
int width(const void* data, int64_t stride) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(data) | uint64_t(stride);
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 2;
}

template <class A, class B>
cudaError_t multiply(const A& a, const B& b, Result<typename A::T> result, int64_t K, const Cut& cut,
                     bool reduced, cudaStream_t stream) {
  result.splits = cut.splits;
  result.paired = result.columns % 2 == 0 && width(result.c, 0) >= 2 * int(sizeof(typename A::T));
  if constexpr (sizeof(typename A::T) == 4)
    if (!reduced)
      return cut.large ? multiply<Simt, Large>(a, b, result, K, stream)
                       : multiply<Simt, Small>(a, b, result, K, stream);
  return cut.large ? multiply<TensorCore, Large>(a, b, result, K, stream)
                   : multiply<TensorCore, Small>(a, b, result, K, stream);
}

// ---- the products of a layer

template <bool transposed, class T>
Plain<T, transposed> plain(const void* data, int64_t stride, int64_t rows) {
  return {static_cast<const T*>(data), stride, rows, width(data, stride * int64_t{sizeof(T)})};
}

template <class T>
cudaError_t forward(const Forward& f, float* partials, cudaStream_t stream) {
  const Result<T> result{.c = static_cast<T*>(f.y),
                         .bias = static_cast<const T*>(f.bias),
                         .activation = f.activation,
                         .rows = f.M,
                         .columns = f.N,
                         .partials = partials};
  return multiply(plain<false, T>(f.x, f.ldx, f.M), plain<false, T>(f.weight, f.ldw, f.N), result, f.K,
                  cut(f.dtype, f.M, f.N, f.K), f.reduced, stream);
}

template <class T>
cudaError_t backward(const Backward& b, float* partials, cudaStream_t stream) {
  const auto dz = [&](auto transposed, int64_t rows) {
    const void* const y = b.activation == Activation::identity ? b.grad_y : b.y;
    const int64_t bytes = b.N * int64_t{sizeof(T)};
    return Dz<T, decltype(transposed)::value>{static_cast<const T*>(b.grad_y),
                                              static_cast<const T*>(y),
                                              b.N,
                                              rows,
                                              std::min(width(b.grad_y, bytes), width(y, bytes)),
                                              b.activation};
  };
  cudaError_t error = cudaSuccess;
  if (b.grad_weight || b.grad_bias) {
    const Result<T> result{.c = static_cast<T*>(b.grad_weight),
                           .row_sums = static_cast<T*>(b.grad_bias),
                           .rows = b.N,
                           .columns = b.K,
                           .partials = partials};
    const auto x = b.grad_weight ? plain<true, T>(b.x, b.ldx, b.K) : plain<true, T>(b.grad_y, 0, 0);
    error =
        multiply(dz(std::true_type{}, b.N), x, result, b.M, cut(b.dtype, b.N, b.K, b.M), b.reduced, stream);
  }
  if (error == cudaSuccess && b.grad_x) {
    const Result<T> result{.c = static_cast<T*>(b.grad_x), .rows = b.M, .columns = b.K, .partials = partials};
    error = multiply(dz(std::false_type{}, b.M), plain<true, T>(b.weight, b.ldw, b.K), result, b.N,
                     cut(b.dtype, b.M, b.K, b.N), b.reduced, stream);
  }
  return error;
}

}  // namespace

const char* toolkit() { return FASTMLP_TEXT(__CUDACC_VER_MAJOR__) "." FASTMLP_TEXT(__CUDACC_VER_MINOR__); }

const char* architectures() { return FASTMLP_TEXT(__CUDA_ARCH_LIST__); }

int64_t forward_workspace(const Forward* layers, int64_t count) {
  return 2 * between_bytes(layers, count) + largest_split(layers, count);
}

int forward(const Forward* layers, int64_t count, void* workspace, void* stream) {
  char* const between = static_cast<char*>(workspace);
  const int64_t bytes = between_bytes(layers, count);
  float* const partials = reinterpret_cast<float*>(between + 2 * bytes);
  cudaError_t error = cudaSuccess;
  for (int64_t i = 0; i < count && error == cudaSuccess; ++i) {
    Forward f = layers[i];
    if (!f.x) f.x = between + (i + 1) % 2 * bytes;
    if (!f.y) f.y = between + i % 2 * bytes;
    error = with_dtype(f.dtype, [&](auto type) {
      return forward<typename decltype(type)::type>(f, partials, static_cast<cudaStream_t>(stream));
    });
  }
  return error;
}

int64_t backward_workspace(const Backward* layers, int64_t count) {
  return 2 * between_bytes(layers, count) + largest_split(layers, count);
}

int backward(const Backward* layers, int64_t count, void* workspace, void* stream) {
  char* const between = static_cast<char*>(workspace);
  const int64_t bytes = between_bytes(layers, count);
  float* const partials = reinterpret_cast<float*>(between + 2 * bytes);
  cudaError_t error = cudaSuccess;
  for (int64_t i = 0; i < count && error == cudaSuccess; ++i) {
    Backward b = layers[i];
    if (i > 0) b.grad_y = between + (i + 1) % 2 * bytes;
    if (i + 1 < count) b.grad_x = between + i % 2 * bytes;
    error = with_dtype(b.dtype, [&](auto type) {
      return backward<typename decltype(type)::type>(b, partials, static_cast<cudaStream_t>(stream));
    });
  }
  return error;
}

int64_t cross_entropy_workspace(const CrossEntropy& p) { return softmax::workspace(p); }

int cross_entropy(const CrossEntropy& p, void* workspace, void* stream) {
  return with_dtype(p.dtype, [&](auto type) {
    return softmax::cross_entropy<typename decltype(type)::type>(p, static_cast<float*>(workspace),
                                                                 static_cast<cudaStream_t>(stream));
  });
}

int sgd(const Sgd& s, const Update* updates, int64_t count, void* stream) {
  return with_dtype(s.dtype, [&](auto type) {
    return update::run<typename decltype(type)::type>(s, updates, count, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace fastmlp::cuda
