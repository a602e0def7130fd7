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

using Large = Tiling<128, 128, 64, 32, 3>;
using Small = Tiling<64, 64, 32, 32, 4>;

// Bytes of the splits' sums.
int64_t split_bytes(const Cut& own, int64_t rows, int64_t columns) {
  const auto bytes = [](const Cut& c) {
    return Splits::bytes(c, c.size * c.size + (c.size == Large::m ? Large::threads : Small::threads));
  };
  return std::max(bytes(own), bytes(in_small_tiles(own, rows, columns)));
}
int64_t split_bytes(const Forward& f) { return split_bytes(cut(f.dtype, f.M, f.N, f.K, f.K, f.K), f.M, f.N); }
int64_t split_bytes(const Backward& b) {  // does not depend on which outputs are asked for
  return std::max(split_bytes(cut(b.dtype, b.M, b.K, b.N, b.N, b.K), b.M, b.K),
                  split_bytes(cut(b.dtype, b.N, b.K, b.M, b.N, b.K), b.N, b.K));
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
  const Cut own = cut(dtype, result.rows, result.columns, K, A::transposed ? result.rows : K,
                      B::transposed ? result.columns : K);
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
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}

// A function that tells it on the current device.
auto owners() {
  const bool by_table = products.owner == Owner::table && !products.table.empty();
  return [own = by_table ? architecture() : 0](Kind kind, Dtype dtype, bool reduced, double operations) {
    if (products.owner != Owner::table) return products.owner;
    const int size = operations > 0 ? std::ilogb(operations) : 0;
    for (const Measured& m : products.table)
      if (m.architecture == own && m.dtype == dtype && m.reduced == (reduced && dtype == Dtype::float32) &&
          m.kind == kind && m.size == size)
        return m.owner;
    return owner_of(operations);
  };
}

template <class Layer>
bool is_chain(Kind kind, const Layer* layers, int64_t count) {
  return is_chain(kind, layers, count, owners(), most_shared_memory());
}

// ---- chains

using Narrow = Tiling<64, 64, 32, 32, 1>;
using LessNarrow = Tiling<64, 128, 32, 32, 1>;

// With copies of 16 bytes, or of one element.
template <template <class, class, class, class> class Math, class Tiling, class T, bool transposed>
cudaError_t run_chain(const Operand<T, false>& first, Links<T, transposed> links, int64_t M,
                      cudaStream_t stream) {
  constexpr Dtype dtype = sizeof(T) == 4 ? Dtype::float32 : Dtype::bfloat16;
  static_assert(Shared<T, transposed, Tiling>::bytes(0) == chain_rows_bytes(dtype, Tiling::n) &&
                Shared<T, transposed, Tiling>::bytes(1) ==
                    chain_rows_bytes(dtype, Tiling::n) + chain_weight_bytes(dtype, Tiling::n));
  links.slots = chain_slots(dtype, Tiling::n, links.count, most_shared_memory());
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
cudaError_t forward(const Forward& f, Owner owner, void* memory, cudaStream_t stream) {
  if (owner == Owner::kernels)
    return multiply(operand<false, T>(f.x, f.ldx, f.M), operand<false, T>(f.weight, f.ldw, f.N),
                    result_of<T>(f), f.K, f.reduced, memory, stream);
  products.library(
      {f.dtype, f.M, f.N, f.K, {f.x, {f.ldx, 1}}, {f.weight, {1, f.ldw}}, f.bias, f.z ? f.z : f.y});
  return cudaSuccess;
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
    bytes = std::max(bytes, elementwise::workspace(b->dtype, b->M, b->N));
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

// Of a layer whose dy is dz.
template <class T>
cudaError_t dx(const Backward& b, const Backward* below, void* x, Owner owner, void* memory,
               cudaStream_t stream) {
  if (owner == Owner::kernels)
    return multiply(operand<false, T>(b.grad_y, b.N, b.M), operand<true, T>(b.weight, b.ldw, b.K),
                    dx_of<T>(b, below, x), b.N, b.reduced, memory, stream);
  products.library({b.dtype, b.M, b.K, b.N, {b.grad_y, {b.N, 1}}, {b.weight, {b.ldw, 1}}, nullptr, b.grad_x});
  return cudaSuccess;
}

// The same, with db.
template <class T>
cudaError_t dW(const Backward& b, Owner owner, void* memory, cudaStream_t stream) {
  if (owner == Owner::library) {
    products.library(
        {b.dtype, b.N, b.K, b.M, {b.grad_y, {1, b.N}}, {b.x, {b.ldx, 1}}, nullptr, b.grad_weight});
    return cudaSuccess;
  }
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
  char* const between = static_cast<char*>(workspace);
  const int64_t bytes = between_bytes(layers, count);
  return with_dtype(layers->dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for (const Planned& p : plan(layers, count, owners(), most_shared_memory())) {
      Forward f = layers[p.layer];
      if (!f.x) f.x = between + (p.layer + 1) % 2 * bytes;
      if (!f.y) f.y = between + p.layer % 2 * bytes;
      const cudaError_t error =
          p.launch == Launch::chain_forward ? forward_chain<T>(layers, count, stream)
          : p.launch == Launch::forward
              ? forward<T>(f, p.owner, between + 2 * bytes, stream)
              : elementwise::activate<T>(f.z ? f.z : f.y, f.N, f.y, f.M, f.N, f.activation, stream);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  });
}

int64_t backward_workspace(const Backward* layers, int64_t count) {
  const bool chained = is_chain(Kind::chain_backward, layers, count);
  return places(layers, count, chained, 0).memory + bytes_to_work_in(layers, count);
}

int backward(const Backward* layers_, int64_t count, void* workspace, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const bool chained = is_chain(Kind::chain_backward, layers_, count);
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
    const auto run = [&](const Planned& p) {
      Backward& b = layers[p.layer];
      const Backward* const below = p.layer + 1 < count ? &b + 1 : nullptr;
      switch (p.launch) {
        case Launch::differentiate: {  // in the place of dy, where that is not the caller's
          void* const dz = p.layer ? const_cast<void*>(b.grad_y) : own;
          const cudaError_t error =
              elementwise::differentiate<T>(b, p.forms_dz ? dz : nullptr, p.layer ? x[p.layer - 1] : nullptr,
                                            p.sums ? b.grad_bias : nullptr, memory, stream);
          if (p.forms_dz) b.grad_y = dz;
          return error;
        }
        case Launch::chain_backward:
          return backward_chain<T>(layers.data(), count, x.data(), stream);
        case Launch::dx:
          return dx<T>(b, below, x[p.layer], p.owner, memory, stream);
        case Launch::find_x:
          return elementwise::activate<T>(b.x, b.ldx, x[p.layer], b.M, b.K, b.x_activation, stream);
        default:
          if (x[p.layer]) b.x = x[p.layer], b.ldx = b.K;
          return dW<T>(b, p.owner, memory, stream);
      }
    };
    for (const Planned& p : plan(layers_, count, owners(), most_shared_memory()))
      if (const cudaError_t error = run(p); error != cudaSuccess) return error;
    return cudaSuccess;
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
  return owners()(kind, dtype, reduced, operations);
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
