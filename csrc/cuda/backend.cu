// The CUDA backend: picks the kernels for a call and enqueues them.
#include <algorithm>
#include <cmath>
#include <initializer_list>
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

// ---- the choice of kernels
//
//   bfloat16, float16              tensor cores, on sm_80 to sm_120 by the same instructions
//   float32                        multiply-adds
//   float32 where reduced          tensor cores, as tf32
//
// and of tiles in plan.h.

using Large = Tiling<128, 128, 64, 32, 3, 1>;
using Small = Tiling<64, 64, 32, 32, 4, 3>;

constexpr int64_t blocks_of_sums = 4 * multiprocessors;

// Bytes of the splits' sums.
int64_t split_bytes(Dtype dtype, int64_t rows, int64_t columns, int64_t K) {
  const Cut own = cut(dtype, rows, columns, K);
  const auto bytes = [](const Cut& c) {
    return Splits::bytes(c, c.size * c.size + (c.size == Large::m ? Large::threads : Small::threads));
  };
  return std::max(bytes(own), bytes(in_small_tiles(own, rows, columns)));
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

// Bytes of the copies that bring an operand, none of which is half inside.
template <class T, bool transposed>
int width(const Operand<T, transposed>& operand, int64_t K) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(operand.data) |
                        uint64_t(operand.stride | (transposed ? operand.rows : K)) * sizeof(T);
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 2;
}

template <template <class, class, class, class> class Math, class A, class B>
cudaError_t multiply(const A& a, const B& b, const Result<typename A::T>& result, int64_t K, Cut own,
                     void* memory, cudaStream_t stream) {
  const int bytes = std::min(width(a, K), width(b, K));
  if (own.size == Large::m && bytes == 16 && result.c)
    return multiply<Math, Large, 16>(a, b, result, K, own, memory, stream);
  own = in_small_tiles(own, result.rows, result.columns);
  if (!result.c) own.tiles = blocks_of(result.rows, Small::m);  // the first across sum the rows
  if (bytes == 16) return multiply<Math, Small, 16>(a, b, result, K, own, memory, stream);
  if constexpr (sizeof(typename A::T) == 2)
    if (bytes == 2) return multiply<Math, Small, 2>(a, b, result, K, own, memory, stream);
  return multiply<Math, Small, 4>(a, b, result, K, own, memory, stream);
}

template <class A, class B>
cudaError_t multiply(const A& a, const B& b, const Result<typename A::T>& result, int64_t K, bool reduced,
                     void* memory, cudaStream_t stream) {
  constexpr Dtype dtype = sizeof(typename A::T) == 4 ? Dtype::float32 : Dtype::bfloat16;
  const Cut own = cut(dtype, result.rows, result.columns, K);
  if constexpr (dtype == Dtype::float32)
    if (!reduced) return multiply<Simt>(a, b, result, K, own, memory, stream);
  return multiply<TensorCore>(a, b, result, K, own, memory, stream);
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

// With copies of 16 bytes, or of one element.
template <template <class, class, class, class> class Math, class Tiling, class T, bool transposed>
cudaError_t run_chain(const Operand<T, false>& first, Links<T, transposed> links, int64_t M,
                      cudaStream_t stream) {
  links.slots = slots<T, Tiling>(links.count);
  bool wide = width(first, links.links[0].K) == 16;
  for (int i = 0; i < links.count; ++i) wide &= width(links.links[i].weight, links.links[i].K) == 16;
  const int64_t bytes = Shared<T, transposed, Tiling>::bytes(links.slots);
  const int64_t blocks = std::min(blocks_of(M, Tiling::m), 2 * multiprocessors);
  return wide ? launch_with<chain<Math, Tiling, 16, T, transposed>>(bytes, blocks, Tiling::threads, stream,
                                                                    first, links, M)
              : launch_with<chain<Math, Tiling, sizeof(T), T, transposed>>(bytes, blocks, Tiling::threads,
                                                                           stream, first, links, M);
}

template <class T, bool transposed>
cudaError_t run_chain(const Operand<T, false>& first, const Links<T, transposed>& links, int64_t width,
                      int64_t M, bool reduced, cudaStream_t stream) {
  const bool narrow = width <= Narrow::n;
  if constexpr (sizeof(T) == 4)
    if (!reduced)
      return narrow ? run_chain<Simt, Narrow>(first, links, M, stream)
                    : run_chain<Simt, LessNarrow>(first, links, M, stream);
  return narrow ? run_chain<TensorCore, Narrow>(first, links, M, stream)
                : run_chain<TensorCore, LessNarrow>(first, links, M, stream);
}

// ---- a layer, in the terms of a product

template <bool transposed, class T>
Operand<T, transposed> operand(const void* data, int64_t stride, int64_t rows) {
  return {static_cast<const T*>(data), stride, rows};
}

// Whether whole packs can be loaded and stored, where pointers are null or to matrices of so many columns.
template <class T>
bool is_aligned(int64_t columns, std::initializer_list<const void*> pointers) {
  uint64_t bits = columns * sizeof(T);
  for (const void* p : pointers) bits |= reinterpret_cast<uintptr_t>(p);
  return cuda::is_aligned<T>(bits);
}

template <class T>
Result<T> result_of(const Forward& f) {
  return {.c = static_cast<T*>(f.y),
          .bias = static_cast<const T*>(f.bias),
          .activation = f.activation,
          .beside = static_cast<T*>(f.z),
          .rows = f.M,
          .columns = f.N,
          .aligned = is_aligned<T>(f.N, {f.y, f.z})};
}

// dx, or the dz of the layer below, with x, which is its y, where that is wanted.
template <class T>
Result<T> dx_of(const Backward& b, const Backward* below, void* x) {
  Result<T> result{.c = static_cast<T*>(b.grad_x), .rows = b.M, .columns = b.K};
  if (below && below->activation != Activation::identity) {
    result.activation = below->activation;
    result.saved = static_cast<const T*>(below->saved);
    result.beside = static_cast<T*>(x);
  }
  result.aligned = is_aligned<T>(b.K, {result.c, result.saved, result.beside});
  return result;
}

// ---- forward

template <class T>
cudaError_t forward(const Forward& f, void* memory, cudaStream_t stream) {
  if (is_librarys(Kind::forward, f)) {
    void* const z = f.z ? f.z : f.y;
    products.library({f.dtype, f.M, f.N, f.K, {f.x, {f.ldx, 1}}, {f.weight, {1, f.ldw}}, f.bias, z});
    if (z == f.y && f.activation == Activation::identity) return cudaSuccess;
    return elementwise::activate<T>(z, f.y, f.M * f.N, f.activation, stream);
  }
  return multiply(operand<false, T>(f.x, f.ldx, f.M), operand<false, T>(f.weight, f.ldw, f.N),
                  result_of<T>(f), f.K, f.reduced, memory, stream);
}

template <class T>
cudaError_t forward_chain(const Forward* layers, int64_t count, cudaStream_t stream) {
  Links<T, false> links{};
  for (const Forward* f = layers; f != layers + count; ++f)
    links.links[links.count++] = {operand<false, T>(f->weight, f->ldw, f->N), int(f->K), result_of<T>(*f)};
  return run_chain(operand<false, T>(layers->x, layers->ldx, layers->M), links, widest(layers, count),
                   layers->M, layers->reduced, stream);
}

// ---- backward
//
// dz of the last layer comes of a pass of its own. Each other is formed where dx of the layer above is: as that leaves the
// registers, or after the library's product. So is the x of that layer, where only z has been saved. Then come dW and db.

bool is_dW_librarys(const Backward& b) { return b.grad_weight && is_librarys(Kind::dW, b); }
bool is_found(const Backward& b) { return b.grad_weight && b.x_activation != Activation::identity; }

// Where in the workspace a layer's dz is, and its x; and what all layers work in. A chain needs all dz and x at once;
// else two dz are there in turn, and one x.
struct Places {
  int64_t dz = 0, x = 0, memory = 0;
};
Places places(const Backward* layers, int64_t count, bool chained, int64_t layer) {
  Places own;
  int64_t widest_dz = 0, widest_x = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Backward& b = layers[i];
    const bool is_given = i == 0 && b.activation == Activation::identity;
    const int64_t dz = is_given ? 0 : matrix_bytes(b.dtype, b.M, b.N);
    const int64_t x = is_found(b) ? matrix_bytes(b.dtype, b.M, b.K) : 0;
    if (i < layer) own.dz += dz + x;
    if (i == layer) own.x = own.dz + dz;
    own.memory += dz + x;
    widest_dz = std::max(widest_dz, dz), widest_x = std::max(widest_x, x);
  }
  return chained ? own : Places{layer % 2 * widest_dz, 2 * widest_dz, 2 * widest_dz + widest_x};
}

// What is worked in: for the splits' sums, and those of the passes.
int64_t bytes_to_work_in(const Backward* layers, int64_t count) {
  int64_t bytes = largest_split(layers, count);
  for (const Backward* b = layers; b != layers + count; ++b)
    with_dtype(b->dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      bytes = std::max(bytes, elementwise::workspace<T>(b->M, b->N, blocks_of_sums));
    });
  return bytes;
}

// Every dz but the last layer's, and dx.
template <class T>
cudaError_t backward_chain(const Backward* layers, int64_t count, void* const* x, cudaStream_t stream) {
  Links<T, true> links{};
  for (int64_t i = 0; i < count && layers[i].grad_x; ++i)
    links.links[links.count++] = {operand<true, T>(layers[i].weight, layers[i].ldw, layers[i].K),
                                  int(layers[i].N),
                                  dx_of<T>(layers[i], i + 1 < count ? layers + i + 1 : nullptr, x[i])};
  return run_chain(operand<false, T>(layers->grad_y, layers->N, layers->M), links, widest(layers, count),
                   layers->M, layers->reduced, stream);
}

// The pass over dy of a layer that the products leave: for dz where that is not there yet, and x of the layer above with
// it; and for db, where dW is the library's.
template <class T>
cudaError_t form(Backward b, bool is_there, void* dz, void* x, void* memory, cudaStream_t stream) {
  void* const grad_bias = is_dW_librarys(b) ? b.grad_bias : nullptr;
  if (is_there) b.activation = {};
  if (b.activation == Activation::identity && !grad_bias) return cudaSuccess;
  return elementwise::differentiate<T>(b, dz, x, grad_bias, memory, blocks_of_sums, stream);
}

// Of a layer whose dy is dz.
template <class T>
cudaError_t dx(const Backward& b, const Backward* below, void* x, void* memory, cudaStream_t stream) {
  if (is_librarys(Kind::dx, b)) {
    products.library(
        {b.dtype, b.M, b.K, b.N, {b.grad_y, {b.N, 1}}, {b.weight, {b.ldw, 1}}, nullptr, b.grad_x});
    return cudaSuccess;
  }
  return multiply(operand<false, T>(b.grad_y, b.N, b.M), operand<true, T>(b.weight, b.ldw, b.K),
                  dx_of<T>(b, below, x), b.N, b.reduced, memory, stream);
}

// With db, of a layer whose dy is dz.
template <class T>
cudaError_t dW(const Backward& b, void* memory, cudaStream_t stream) {
  if (is_dW_librarys(b)) {
    products.library(
        {b.dtype, b.N, b.K, b.M, {b.grad_y, {1, b.N}}, {b.x, {b.ldx, 1}}, nullptr, b.grad_weight});
    return cudaSuccess;
  }
  if (!b.grad_weight && !b.grad_bias) return cudaSuccess;
  const Result<T> result{.c = static_cast<T*>(b.grad_weight),
                         .row_sums = static_cast<T*>(b.grad_bias),
                         .rows = b.N,
                         .columns = b.K,
                         .aligned = is_aligned<T>(b.K, {b.grad_weight})};
  const auto x = b.grad_weight ? operand<true, T>(b.x, b.ldx, b.K) : operand<true, T>(nullptr, 0, 0);
  return multiply(operand<true, T>(b.grad_y, b.N, b.N), x, result, b.M, b.reduced, memory, stream);
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
    cudaError_t error = cudaSuccess;
    for (int64_t i = 0; i < count && error == cudaSuccess; ++i) {
      Forward f = layers[i];
      if (!f.x) f.x = between + (i + 1) % 2 * bytes;
      if (!f.y) f.y = between + i % 2 * bytes;
      error = forward<T>(f, between + 2 * bytes, stream);
    }
    return error;
  });
}

int64_t backward_workspace(const Backward* layers, int64_t count) {
  return places(layers, count, is_chain(Kind::chain_backward, layers, count), 0).memory +
         bytes_to_work_in(layers, count);
}

int backward(const Backward* layers_, int64_t count, void* workspace, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const bool chained = is_chain(Kind::chain_backward, layers_, count);  // asks the driver, so once
  char* const own = static_cast<char*>(workspace);
  std::vector<Backward> layers(layers_, layers_ + count);
  std::vector<void*> x(count);
  void* memory = nullptr;
  for (int64_t i = 0; i < count; ++i) {
    const Places there = places(layers_, count, chained, i);
    if (i > 0) layers[i].grad_y = layers[i - 1].grad_x = own + there.dz;
    if (is_found(layers[i])) x[i] = own + there.x;
    memory = own + there.memory;
  }
  return with_dtype(layers_->dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    cudaError_t error = cudaSuccess;
    const auto then = [&](auto f) { error = error == cudaSuccess ? f() : error; };
    const bool is_given = layers[0].activation == Activation::identity;
    then([&] { return form<T>(layers[0], false, is_given ? nullptr : own, nullptr, memory, stream); });
    if (!is_given) layers[0].grad_y = own;
    if (chained) then([&] { return backward_chain<T>(layers.data(), count, x.data(), stream); });
    for (int64_t i = 0; i < count; ++i) {
      Backward& b = layers[i];
      const Backward* below = i + 1 < count ? &layers[i + 1] : nullptr;
      const bool is_there = chained || !is_librarys(Kind::dx, b);  // the dz below
      if (!chained && b.grad_x) then([&] { return dx<T>(b, below, x[i], memory, stream); });
      if (below)
        then([&] { return form<T>(*below, is_there, is_there ? nullptr : b.grad_x, x[i], memory, stream); });
      if (x[i] && !below)
        then([&] { return elementwise::activate<T>(b.x, x[i], b.M * b.K, b.x_activation, stream); });
      if (x[i]) b.x = x[i], b.ldx = b.K;
      then([&] { return dW<T>(b, memory, stream); });
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
