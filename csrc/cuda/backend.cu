// The CUDA backend: picks the kernels for a call and enqueues them.
#include <algorithm>

#include "../activation.h"
#include "../kernels.h"
#include "launch.cuh"
#include "softmax.cuh"
#include "tiled.cuh"
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

// A layer's workspace: dz [M, N] in the call's dtype, then db's partial sums. The identity's dz is dy itself.
int64_t dz_bytes(const Backward& b) {
  return b.activation == Activation::identity ? 0 : matrix_bytes(b.dtype, b.M, b.N);
}

// Does not depend on which outputs are asked for.
int64_t layer_workspace(const Backward& b) {
  const int64_t chunks = tiled::chunks(b.M);
  return dz_bytes(b) + (chunks > 1 ? chunks * b.N * int64_t{sizeof(float)} : 0);
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

template <Activation g, class T>
cudaError_t forward(const Forward& f, cudaStream_t stream) {
  const tiled::Operand<T, false> x{static_cast<const T*>(f.x), f.ldx, f.M};
  const tiled::Operand<T, false> weight{static_cast<const T*>(f.weight), f.ldw, f.N};
  return tiled::multiply<g>(x, weight, static_cast<const T*>(f.bias), static_cast<T*>(f.y), f.K, stream);
}

template <Activation g, class T>
cudaError_t backward(const Backward& b, void* workspace, cudaStream_t stream) {
  constexpr Activation identity = Activation::identity;
  const T* no_bias = nullptr;
  const T* grad_y = static_cast<const T*>(b.grad_y);
  const bool needs_dz = g != identity && (b.grad_x || b.grad_weight);
  T* formed = needs_dz ? static_cast<T*>(workspace) : nullptr;
  const T* dz = g == identity ? grad_y : formed;
  cudaError_t error = cudaSuccess;

  if (needs_dz || b.grad_bias) {
    float* partials = reinterpret_cast<float*>(static_cast<char*>(workspace) + dz_bytes(b));
    error = tiled::differentiate_and_sum<g>(grad_y, static_cast<const T*>(b.y), formed, partials,
                                            static_cast<T*>(b.grad_bias), b.M, b.N, stream);
  }
  if (error == cudaSuccess && b.grad_weight) {
    const tiled::Operand<T, true> dz_transposed{dz, b.N, b.N};
    const tiled::Operand<T, true> x_transposed{static_cast<const T*>(b.x), b.ldx, b.K};
    error = tiled::multiply<identity>(dz_transposed, x_transposed, no_bias, static_cast<T*>(b.grad_weight),
                                      b.M, stream);
  }
  if (error == cudaSuccess && b.grad_x) {
    const tiled::Operand<T, false> dz_rows{dz, b.N, b.M};
    const tiled::Operand<T, true> weight_transposed{static_cast<const T*>(b.weight), b.ldw, b.K};
    error = tiled::multiply<identity>(dz_rows, weight_transposed, no_bias, static_cast<T*>(b.grad_x), b.N,
                                      stream);
  }
  return error;
}

}  // namespace

const char* toolkit() { return FASTMLP_TEXT(__CUDACC_VER_MAJOR__) "." FASTMLP_TEXT(__CUDACC_VER_MINOR__); }

const char* architectures() { return FASTMLP_TEXT(__CUDA_ARCH_LIST__); }

int64_t forward_workspace(const Forward* layers, int64_t count) { return 2 * between_bytes(layers, count); }

int forward(const Forward* layers, int64_t count, void* workspace, void* stream) {
  char* const between = static_cast<char*>(workspace);
  const int64_t bytes = between_bytes(layers, count);
  cudaError_t error = cudaSuccess;
  for (int64_t i = 0; i < count && error == cudaSuccess; ++i) {
    Forward f = layers[i];
    if (!f.x) f.x = between + (i + 1) % 2 * bytes;
    if (!f.y) f.y = between + i % 2 * bytes;
    error = with_dtype(f.dtype, [&](auto type) {
      return with_activation(f.activation, [&](auto g) {
        return forward<decltype(g)::value, typename decltype(type)::type>(f,
                                                                          static_cast<cudaStream_t>(stream));
      });
    });
  }
  return error;
}

int64_t backward_workspace(const Backward* layers, int64_t count) {
  int64_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, layer_workspace(layers[i]));
  return 2 * between_bytes(layers, count) + largest;
}

int backward(const Backward* layers, int64_t count, void* workspace, void* stream) {
  char* const between = static_cast<char*>(workspace);
  const int64_t bytes = between_bytes(layers, count);
  cudaError_t error = cudaSuccess;
  for (int64_t i = 0; i < count && error == cudaSuccess; ++i) {
    Backward b = layers[i];
    if (i > 0) b.grad_y = between + (i + 1) % 2 * bytes;
    if (i + 1 < count) b.grad_x = between + i % 2 * bytes;
    error = with_dtype(b.dtype, [&](auto type) {
      return with_activation(b.activation, [&](auto g) {
        return backward<decltype(g)::value, typename decltype(type)::type>(b, between + 2 * bytes,
                                                                           static_cast<cudaStream_t>(stream));
      });
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
