// The CUDA backend: picks the kernels for a call and enqueues them.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../activation.h"
#include "../kernels.h"
#include "chain.cuh"
#include "clip.cuh"
#include "elementwise.cuh"
#include "launch.cuh"
#include "product.cuh"
#include "simt.cuh"
#include "softmax.cuh"
#include "step.cuh"
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

// Of a large GPU. The number is fixed, so that no sum is split in another way on another GPU.
#ifndef FASTMLP_MULTIPROCESSORS
#define FASTMLP_MULTIPROCESSORS 128
#endif
constexpr int64_t multiprocessors = FASTMLP_MULTIPROCESSORS;
constexpr int64_t blocks_of_sums = 4 * multiprocessors;

// How a product is cut: into large or small tiles, and splits of its sum.
struct Cut {
  bool large;
  int64_t splits;
};

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

// ---- whose a product is

struct {
  Library library = nullptr;
  Owner owner = Owner::kernels;
  std::vector<Measured> table;
} products;

int architecture() {
  int device = 0, major = 0, minor = 0;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  return known ? 10 * major + minor : 0;
}

template <class Layer>
bool is_librarys(Kind kind, const Layer& layer) {
  const double operations = 2.0 * layer.M * layer.N * layer.K;
  return owner_of(kind, layer.dtype, layer.reduced, operations) == Owner::library;
}
bool is_any_librarys(const Backward& b) { return is_librarys(Kind::dW, b) || is_librarys(Kind::dx, b); }

// ---- narrow networks
//
//   all widths up to 64, or 128    the layers as one chain, where two weights or all fit in shared memory
//
// Tiles of 64 rows and all columns.

using Narrow = Tiling<64, 64, 32, 32, 1, 1>;
using LessNarrow = Tiling<64, 128, 32, 32, 1, 1>;

// How many of `count` links' weights there is room for.
template <class T, class Tiling>
int slots(int64_t count) {
  const int64_t rows = Shared<T, false, Tiling>::bytes(0);
  const int64_t weight =
      std::max(Shared<T, false, Tiling>::bytes(1), Shared<T, true, Tiling>::bytes(1)) - rows;
  return static_cast<int>(std::clamp<int64_t>((most_shared_memory() - rows) / weight, 0, count));
}

template <class Layer>
int64_t widest(const Layer* layers, int64_t count) {
  int64_t width = 0;
  for (int64_t i = 0; i < count; ++i) width = std::max({width, layers[i].N, layers[i].K});
  return width;
}

template <class Layer>
bool is_chain(Kind kind, const Layer* layers, int64_t count) {
  const int64_t width = widest(layers, count);
  if (count < 2 || count > most_links || width > LessNarrow::n) return false;
  double operations = 0;
  for (int64_t i = 0; i < count; ++i) operations += 2.0 * layers[i].M * layers[i].N * layers[i].K;
  if (owner_of(kind, layers->dtype, layers->reduced, operations) == Owner::library) return false;
  return with_dtype(layers->dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return (width <= Narrow::n ? slots<T, Narrow>(count) : slots<T, LessNarrow>(count)) >= 2;
  });
}

template <template <class, class, class, class> class Math, class Tiling, class First, bool transposed>
cudaError_t run_chain(const First& first, Links<typename First::T, transposed> links, int64_t M,
                      cudaStream_t stream) {
  using T = typename First::T;
  links.slots = slots<T, Tiling>(links.count);
  const int64_t blocks = std::min((M + Tiling::m - 1) / Tiling::m, 2 * multiprocessors);
  return launch_with<chain<Math, Tiling, First, transposed>>(
      Shared<T, transposed, Tiling>::bytes(links.slots), blocks, Tiling::threads, stream, first, links, M);
}

template <class First, bool transposed>
cudaError_t run_chain(const First& first, const Links<typename First::T, transposed>& links, int64_t width,
                      int64_t M, bool reduced, cudaStream_t stream) {
  const bool narrow = width <= Narrow::n;
  if constexpr (sizeof(typename First::T) == 4)
    if (!reduced)
      return narrow ? run_chain<Simt, Narrow>(first, links, M, stream)
                    : run_chain<Simt, LessNarrow>(first, links, M, stream);
  return narrow ? run_chain<TensorCore, Narrow>(first, links, M, stream)
                : run_chain<TensorCore, LessNarrow>(first, links, M, stream);
}

// ---- the products of a layer

template <bool transposed, class T>
Plain<T, transposed> plain(const void* data, int64_t stride, int64_t rows) {
  return {.data = static_cast<const T*>(data),
          .stride = stride,
          .rows = rows,
          .width = width(data, stride * int64_t{sizeof(T)})};
}

template <class T>
Plain<T, false> x_of(const Forward& f) {
  return plain<false, T>(f.x, f.ldx, f.M);
}
template <class T>
Plain<T, false> weight_of(const Forward& f) {
  return plain<false, T>(f.weight, f.ldw, f.N);
}
template <class T>
Plain<T, true> weight_of(const Backward& b) {
  return plain<true, T>(b.weight, b.ldw, b.K);
}

template <bool transposed, class T>
Dz<T, transposed> dz_of(const Backward& b) {
  const void* const saved = b.activation == Activation::identity ? b.grad_y : b.saved;
  const int64_t bytes = b.N * int64_t{sizeof(T)};
  return {.grad_y = static_cast<const T*>(b.grad_y),
          .saved = static_cast<const T*>(saved),
          .stride = b.N,
          .rows = transposed ? b.N : b.M,
          .width = std::min(width(b.grad_y, bytes), width(saved, bytes)),
          .activation = b.activation};
}

template <class T>
Result<T> y_of(const Forward& f) {
  return {.c = static_cast<T*>(f.y),
          .bias = static_cast<const T*>(f.bias),
          .activation = f.activation,
          .z = static_cast<T*>(f.z),
          .rows = f.M,
          .columns = f.N};
}
template <class T>
Result<T> grad_x_of(const Backward& b) {
  return {.c = static_cast<T*>(b.grad_x), .rows = b.M, .columns = b.K};
}

template <class T>
cudaError_t forward(const Forward& f, float* partials, cudaStream_t stream) {
  if (is_librarys(Kind::forward, f)) {
    void* const z = f.z ? f.z : f.y;
    products.library({f.dtype, f.M, f.N, f.K, {f.x, {f.ldx, 1}}, {f.weight, {1, f.ldw}}, f.bias, z});
    if (z == f.y && f.activation == Activation::identity) return cudaSuccess;
    return elementwise::activate<T>(z, f.y, f.M * f.N, f.activation, stream);
  }
  Result<T> result = y_of<T>(f);
  result.partials = partials;
  return multiply(x_of<T>(f), weight_of<T>(f), result, f.K, cut(f.dtype, f.M, f.N, f.K), f.reduced, stream);
}

bool is_dW_librarys(const Backward& b) {
  const bool is_found =
      b.x_activation == Activation::identity || b.ldx == b.K;  // where x is to be found, without gaps
  return b.grad_weight && is_found && is_librarys(Kind::dW, b);
}

// dW and db.
template <class T>
cudaError_t backward_of_parameters(const Backward& b, void* memory, cudaStream_t stream) {
  if (!b.grad_weight && !b.grad_bias) return cudaSuccess;
  if (is_dW_librarys(b)) {
    const void* x = b.x;
    int64_t ldx = b.ldx;
    if (b.x_activation != Activation::identity) {
      const cudaError_t error = elementwise::activate<T>(b.x, memory, b.M * b.K, b.x_activation, stream);
      if (error != cudaSuccess) return error;
      x = memory, ldx = b.K;
    }
    products.library({b.dtype, b.N, b.K, b.M, {b.grad_y, {1, b.N}}, {x, {ldx, 1}}, nullptr, b.grad_weight});
    return cudaSuccess;
  }
  const Result<T> result{.c = static_cast<T*>(b.grad_weight),
                         .row_sums = static_cast<T*>(b.grad_bias),
                         .rows = b.N,
                         .columns = b.K,
                         .partials = static_cast<float*>(memory)};
  auto x = b.grad_weight ? plain<true, T>(b.x, b.ldx, b.K) : plain<true, T>(b.grad_y, 0, 0);
  x.activation = b.x_activation;
  return multiply(dz_of<true, T>(b), x, result, b.M, cut(b.dtype, b.N, b.K, b.M), b.reduced, stream);
}

// A layer without dx: a chain has computed it. dz is formed before a product of the library, in `dz`.
template <class T>
cudaError_t backward(Backward b, bool has_dx, void* dz, void* memory, cudaStream_t stream) {
  if (is_dW_librarys(b) || (has_dx && b.grad_x && is_librarys(Kind::dx, b))) {
    void* const own = b.activation == Activation::identity ? nullptr : dz;
    const cudaError_t error =
        elementwise::differentiate<T>(b, own, static_cast<float*>(memory), blocks_of_sums, stream);
    if (error != cudaSuccess) return error;
    if (own) b.grad_y = own;
    b.activation = {}, b.grad_bias = nullptr;
  }
  const cudaError_t error = backward_of_parameters<T>(b, memory, stream);
  if (error != cudaSuccess || !has_dx || !b.grad_x) return error;
  if (is_librarys(Kind::dx, b)) {
    products.library(
        {b.dtype, b.M, b.K, b.N, {b.grad_y, {b.N, 1}}, {b.weight, {b.ldw, 1}}, nullptr, b.grad_x});
    return cudaSuccess;
  }
  Result<T> result = grad_x_of<T>(b);
  result.partials = static_cast<float*>(memory);
  return multiply(dz_of<false, T>(b), weight_of<T>(b), result, b.N, cut(b.dtype, b.M, b.K, b.N), b.reduced,
                  stream);
}

// Of the last layer's dz: those of the others take the place of dy.
int64_t dz_bytes(const Backward& last) {
  return last.activation != Activation::identity && is_any_librarys(last)
             ? matrix_bytes(last.dtype, last.M, last.N)
             : 0;
}

// What one layer after the other works in: for the splits' sums, for those of db, and for x.
int64_t bytes_to_work_in(const Backward* layers, int64_t count) {
  int64_t bytes = largest_split(layers, count);
  for (const Backward* b = layers; b != layers + count; ++b) {
    if (!is_any_librarys(*b)) continue;
    with_dtype(b->dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      bytes = std::max(bytes, elementwise::workspace<T>(b->M, b->N, blocks_of_sums));
    });
    if (b->grad_weight && b->x_activation != Activation::identity)
      bytes = std::max(bytes, matrix_bytes(b->dtype, b->M, b->K));
  }
  return bytes;
}

// ---- the layers of a narrow network

template <class T>
cudaError_t forward_chain(const Forward* layers, int64_t count, cudaStream_t stream) {
  Links<T, false> links{};
  for (const Forward* f = layers; f != layers + count; ++f)
    links.links[links.count++] = {.weight = weight_of<T>(*f), .K = f->K, .result = y_of<T>(*f)};
  return run_chain(x_of<T>(*layers), links, widest(layers, count), layers->M, layers->reduced, stream);
}

// Every dx; the gradients of the parameters are computed from them.
template <class T>
cudaError_t backward_chain(const Backward* layers, int64_t count, cudaStream_t stream) {
  Links<T, true> links{};
  for (int64_t i = 0; i < count && layers[i].grad_x; ++i) {
    Link<T, true> link{
        .weight = weight_of<T>(layers[i]), .K = layers[i].N, .result = grad_x_of<T>(layers[i])};
    if (i + 1 < count && layers[i + 1].activation != Activation::identity) {
      link.saved = static_cast<const T*>(layers[i + 1].saved);
      link.activation_of_saved = layers[i + 1].activation;
    }
    links.links[links.count++] = link;
  }
  return run_chain(dz_of<false, T>(*layers), links, widest(layers, count), layers->M, layers->reduced,
                   stream);
}

// Where in the workspace the grad_x of layer i is that only the backend reads; for i = count − 1, where they end. Of
// a chain all are needed at once.
int64_t grad_x_offset(const Backward* layers, int64_t count, bool chained, int64_t i) {
  if (!chained) return (i + 1 < count ? i % 2 : 2) * between_bytes(layers, count);
  int64_t bytes = 0;
  for (int64_t j = 0; j < i; ++j) bytes += matrix_bytes(layers->dtype, layers->M, layers[j].K);
  return bytes;
}

}  // namespace

const char* toolkit() { return FASTMLP_TEXT(__CUDACC_VER_MAJOR__) "." FASTMLP_TEXT(__CUDACC_VER_MINOR__); }

const char* architectures() { return FASTMLP_TEXT(__CUDA_ARCH_LIST__); }

bool runs_on(int device) { return has_code<softmax::weigh>(device); }

int64_t forward_workspace(const Forward* layers, int64_t count) {
  return is_chain(Kind::chain_forward, layers, count)
             ? 0
             : 2 * between_bytes(layers, count) + largest_split(layers, count);
}

int forward(const Forward* layers, int64_t count, void* workspace, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  return with_dtype(layers->dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (is_chain(Kind::chain_forward, layers, count)) return forward_chain<T>(layers, count, stream);
    char* const between = static_cast<char*>(workspace);
    const int64_t bytes = between_bytes(layers, count);
    float* const partials = reinterpret_cast<float*>(between + 2 * bytes);
    cudaError_t error = cudaSuccess;
    for (int64_t i = 0; i < count && error == cudaSuccess; ++i) {
      Forward f = layers[i];
      if (!f.x) f.x = between + (i + 1) % 2 * bytes;
      if (!f.y) f.y = between + i % 2 * bytes;
      error = forward<T>(f, partials, stream);
    }
    return error;
  });
}

int64_t backward_workspace(const Backward* layers, int64_t count) {
  const bool chained = is_chain(Kind::chain_backward, layers, count);
  return grad_x_offset(layers, count, chained, count - 1) + dz_bytes(*layers) +
         bytes_to_work_in(layers, count);
}

int backward(const Backward* layers, int64_t count, void* workspace, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  char* const between = static_cast<char*>(workspace);
  const bool chained = is_chain(Kind::chain_backward, layers, count);  // asks the driver, so once
  char* const dz = between + grad_x_offset(layers, count, chained, count - 1);
  char* const memory = dz + dz_bytes(*layers);
  const auto with_buffers = [&](int64_t i) {
    Backward b = layers[i];
    if (i > 0) b.grad_y = between + grad_x_offset(layers, count, chained, i - 1);
    if (i + 1 < count) b.grad_x = between + grad_x_offset(layers, count, chained, i);
    return b;
  };
  return with_dtype(layers->dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    cudaError_t error = cudaSuccess;
    if (chained) {
      Backward all[most_links];
      for (int64_t i = 0; i < count; ++i) all[i] = with_buffers(i);
      error = backward_chain<T>(all, count, stream);
    }
    for (int64_t i = 0; i < count && error == cudaSuccess; ++i) {
      const Backward b = with_buffers(i);
      error = backward<T>(b, !chained, i ? const_cast<void*>(b.grad_y) : dz, memory, stream);
    }
    return error;
  });
}

bool is_one_launch(int64_t M, const int64_t* widths, int64_t layers, bool clips) {
  if (layers > whole_step::most_layers || products.owner == Owner::library) return false;
  whole_step::Shape shape{M, layers, {}, clips};
  std::copy_n(widths, layers + 1, shape.widths);
  return whole_step::plan(shape).blocks > 0;
}

int64_t train_workspace(const Step& s) { return whole_step::workspace(s); }

int train(const Step& s, void* workspace, void* stream) {
  return whole_step::run(s, workspace, static_cast<cudaStream_t>(stream));
}

void set_products(Library library, Owner owner, const Measured* table, int64_t count) {
  products.library = library;
  products.owner = library ? owner : Owner::kernels;
  products.table.assign(table, table + count);
}

Owner owner_of(Kind kind, Dtype dtype, bool reduced, double operations) {
  if (products.owner != Owner::table) return products.owner;
  const int own = products.table.empty() ? 0 : architecture();
  const int size = operations > 0 ? std::ilogb(operations) : 0;
  for (const Measured& m : products.table)
    if (m.architecture == own && m.dtype == dtype && m.reduced == (reduced && dtype == Dtype::float32) &&
        m.kind == kind && m.size == size)
      return m.owner;
  return operations < 1e8 ? Owner::kernels : Owner::library;
}

int64_t cross_entropy_workspace(const CrossEntropy& p) { return softmax::workspace(p); }

int cross_entropy(const CrossEntropy& p, void* workspace, void* stream) {
  return with_dtype(p.dtype, [&](auto type) {
    return softmax::cross_entropy<typename decltype(type)::type>(p, static_cast<float*>(workspace),
                                                                 static_cast<cudaStream_t>(stream));
  });
}

int optimize(const Optimizer& o, const Update* updates, int64_t count, void* stream) {
  return with_dtype(o.dtype, [&](auto type) {
    return update::run<typename decltype(type)::type>(o, updates, count, static_cast<cudaStream_t>(stream));
  });
}

int64_t clip_workspace(const Clip& c, const Gradient* gradients, int64_t count) {
  return with_dtype(c.dtype, [&](auto type) {
    return clipping::workspace<typename decltype(type)::type>(gradients, count);
  });
}

int clip(const Clip& c, const Gradient* gradients, int64_t count, void* workspace, void* stream) {
  return with_dtype(c.dtype, [&](auto type) {
    return clipping::run<typename decltype(type)::type>(c, gradients, count, static_cast<double*>(workspace),
                                                        static_cast<cudaStream_t>(stream));
  });
}

}  // namespace fastmlp::cuda
