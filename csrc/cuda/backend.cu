// The CUDA backend: picks the kernels for a call and enqueues them.
#include "../activation.h"
#include "../kernels.h"
#include "launch.cuh"
#include "tiled.cuh"

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

// The workspace: dz [M, N] in the call's dtype, then db's partial sums. The identity's dz is dy itself.
int64_t dz_bytes(const Backward& b) {
  if (b.activation == Activation::identity) return 0;
  const int64_t bytes = b.M * b.N * (b.dtype == Dtype::float32 ? 4 : 2);
  return (bytes + 63) / 64 * 64;
}

template <Activation g, class T>
cudaError_t forward(const Forward& f, cudaStream_t stream) {
  const tiled::Operand<T, false> x{static_cast<const T*>(f.x), f.ldx, f.M};
  const tiled::Operand<T, false> weight{static_cast<const T*>(f.weight), f.ldw, f.N};
  return tiled::multiply<g>(x, weight, static_cast<const T*>(f.bias), static_cast<T*>(f.y), f.K, stream);
}

template <Activation g, class T>
cudaError_t backward(const Backward& b, cudaStream_t stream) {
  constexpr Activation identity = Activation::identity;
  const T* no_bias = nullptr;
  const T* grad_y = static_cast<const T*>(b.grad_y);
  const bool needs_dz = g != identity && (b.grad_x || b.grad_weight);
  T* formed = needs_dz ? static_cast<T*>(b.workspace) : nullptr;
  const T* dz = g == identity ? grad_y : formed;
  cudaError_t error = cudaSuccess;

  if (needs_dz || b.grad_bias) {
    float* partials = reinterpret_cast<float*>(static_cast<char*>(b.workspace) + dz_bytes(b));
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

int forward(const Forward& f, void* stream) {
  return with_dtype(f.dtype, [&](auto type) {
    return with_activation(f.activation, [&](auto g) {
      return forward<decltype(g)::value, typename decltype(type)::type>(f, static_cast<cudaStream_t>(stream));
    });
  });
}

// Does not depend on which outputs are asked for.
int64_t backward_workspace(const Backward& b) {
  const int64_t chunks = tiled::chunks(b.M);
  return dz_bytes(b) + (chunks > 1 ? chunks * b.N * int64_t{sizeof(float)} : 0);
}

int backward(const Backward& b, void* stream) {
  return with_dtype(b.dtype, [&](auto type) {
    return with_activation(b.activation, [&](auto g) {
      return backward<decltype(g)::value, typename decltype(type)::type>(b,
                                                                         static_cast<cudaStream_t>(stream));
    });
  });
}

}  // namespace fastmlp::cuda
