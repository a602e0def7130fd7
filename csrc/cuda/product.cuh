// The three products of a layer are one kernel, which takes the operands as they lie in memory:
//
//   C[m][n] = Σ_k A(m, k) B(n, k)
//
//   y  = g(x Wᵀ + b)     A = x       B = W
//   dx = dz W            A = dz      B = Wᵀ
//   dW = dzᵀ x           A = dzᵀ     B = xᵀ     db[m] = Σ_k A(m, k)
//
// What computes the product of two tiles is a parameter: tensor_core.cuh, or simt.cuh. All sums are in float32 and in
// an order that the shape alone decides, so the same input gives the same bits on the same GPU. Tensor cores add up the
// products of one instruction in ways that differ from generation to generation.
#pragma once

#include <algorithm>

#include "../activation.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace fastmlp::cuda {

// A block's tile of C is m x n, a warp's warp_m x warp_n. Tiles of the operands are in `stages` places of shared
// memory: one is multiplied while the others are on their way.
template <int m_, int n_, int warp_m_, int warp_n_, int stages_, int blocks_>
struct Tiling {
  static constexpr int m = m_, n = n_, warp_m = warp_m_, warp_n = warp_n_, stages = stages_;
  static constexpr int blocks = blocks_;  // of a multiprocessor, at least
  static constexpr int warps_across = n / warp_n;
  static constexpr int threads = 32 * (m / warp_m) * warps_across;
};

// Steps of the sum in a stage: 64 bytes of them.
template <class T>
constexpr int depth = 64 / sizeof(T);

// An operand's tile in shared memory, in lines as in memory. A line of one row holds its `depth` elements along the
// sum; transposed, a line of one k holds the elements of all rows. What a line is longer than its elements puts the
// eight lines that a warp reads at once on different banks.
template <class T, bool transposed_, int rows>
struct Layout {
  static constexpr bool transposed = transposed_;
  static constexpr int lines = transposed ? depth<T> : rows;
  static constexpr int packs = (transposed ? rows : depth<T>) / Pack<T>::size;  // of a line
  static constexpr int pitch = packs * Pack<T>::size + (transposed ? 8 : Pack<T>::size);
  static constexpr int size = lines * pitch;
};

// ---- activations: which one it is, all threads ask at once
//
// The simple ones are part of the unrolled code that has a thread's elements in registers. The others are long: their
// loops are not unrolled, so that a kernel holds each of them once.

__host__ __device__ __forceinline__ bool is_simple(const Activation& activation) {
  return activation.kind == Activation::identity || activation.kind == Activation::relu;
}

// ---- the operands

// An operand in memory: A(row, k) at data[row * stride + k], or transposed at data[k * stride + row]; or the activation
// of it.
template <class T_, bool transposed_>
struct Plain {
  using T = T_;
  static constexpr bool transposed = transposed_;
  const T* data;
  int64_t stride;
  int64_t rows;
  int width;  // bytes of the widest copies that data and stride are multiples of: 16, 8, 4 or 2
  Activation activation;
};

// dz = dy · g', which is nowhere in memory; likewise. Its stride is its width, so copies of `width` bytes are either
// inside or outside.
template <class T_, bool transposed_>
struct Dz {
  using T = T_;
  static constexpr bool transposed = transposed_;
  const T *grad_y, *saved;
  int64_t stride;
  int64_t rows;
  int width;
  Activation activation;
};

// Where a tile begins in memory, and how much of it is inside the operand.
struct Window {
  int64_t offset;
  int lines, columns;

  template <class Operand>
  __device__ __forceinline__ Window(const Operand& operand, int64_t row0, int64_t k0, int64_t K) {
    const int64_t line0 = Operand::transposed ? k0 : row0, column0 = Operand::transposed ? row0 : k0;
    offset = line0 * operand.stride + column0;
    lines = up_to_int((Operand::transposed ? K : operand.rows) - line0);
    columns = up_to_int((Operand::transposed ? operand.rows : K) - column0);
  }

  static __device__ __forceinline__ int up_to_int(int64_t n) {
    return static_cast<int>(n < 0x7fffffff ? n : 0x7fffffff);
  }

  // Of a pack, the elements that are inside.
  template <class T>
  __device__ __forceinline__ int valid(int line, int column) const {
    const int left = columns - column;
    return line >= lines || left <= 0 ? 0 : left < Pack<T>::size ? left : Pack<T>::size;
  }
};

// Calls f(i, line, column) for the packs of a tile that the thread carries. They are all in one column.
template <class Layout, int threads, class T, class F>
__device__ __forceinline__ void each_pack(F f) {
  static_assert(Layout::lines * Layout::packs % threads == 0 && threads % Layout::packs == 0);
#pragma unroll
  for (int i = 0; i < Layout::lines * Layout::packs / threads; ++i) {
    const int pack = threadIdx.x + i * threads;
    f(i, pack / Layout::packs, pack % Layout::packs * Pack<T>::size);
  }
}

// ---- to shared memory: start() begins to bring a tile, finish() ends it, and activate() makes y of z, once the tile is
// there. A thread does all three for the same elements.

template <int bytes, class T>
__device__ __forceinline__ void copy_by(T* to, const T* from, int valid) {
#pragma unroll
  for (int at = 0; at < 16; at += bytes) {
    const int left = valid * int(sizeof(T)) - at;
    const int own = left <= 0 ? 0 : left < bytes ? left : bytes;
    const int skipped = own ? at : 0;
    ptx::copy_async<bytes>(reinterpret_cast<char*>(to) + at, reinterpret_cast<const char*>(from) + skipped,
                           own);
  }
}

// By asynchronous copies, but for an odd width of 16-bit elements, which they have not.
template <class Operand, class Layout, int threads>
struct Carrier {
  using T = typename Operand::T;

  __device__ __forceinline__ void start(T* shared, const Operand& operand, const Window& window) {
    each_pack<Layout, threads, T>([&](int, int line, int column) {
      const int valid = window.valid<T>(line, column);
      const T* const from =
          valid ? operand.data + (window.offset + line * operand.stride + column) : operand.data;
      T* const to = shared + line * Layout::pitch + column;
      if (operand.width == 16) ptx::copy_async<16>(to, from, valid * int(sizeof(T)));
      else if (operand.width == 8) copy_by<8>(to, from, valid);
      else if (operand.width == 4) copy_by<4>(to, from, valid);
      else
        for (int e = 0; e < Pack<T>::size; ++e) to[e] = e < valid ? from[e] : T{};
    });
  }

  __device__ __forceinline__ void finish(T*) {}

  __device__ __forceinline__ void activate(T* shared, const Operand& operand) {
    if (operand.activation.kind == Activation::identity) return;
    each_pack<Layout, threads, T>([&](int, int line, int column) {
      T* const pack = shared + line * Layout::pitch + column;
#pragma unroll 1
      for (int e = 0; e < Pack<T>::size; ++e)
        store(pack + e, activated(operand.activation, to_float(pack[e])));
    });
  }
};

template <class Word, class T>
__device__ __forceinline__ Pack<T> load_by(const T* from, int valid) {
  constexpr int count = 16 / sizeof(Word);
  struct {
    Word words[count];
  } loaded;
#pragma unroll
  for (int i = 0; i < count; ++i)
    loaded.words[i] =
        i * int(sizeof(Word)) < valid * int(sizeof(T)) ? reinterpret_cast<const Word*>(from)[i] : Word{};
  return bit_cast<Pack<T>>(loaded);
}

template <class T>
__device__ __forceinline__ Pack<T> load(const T* from, int valid, int width) {
  if (width == 16) return load_by<uint4>(from, valid);
  if (width == 8) return load_by<uint2>(from, valid);
  if (width == 4) return load_by<uint32_t>(from, valid);
  return load_by<uint16_t>(from, valid);
}

// All move up by one place, and `last` takes the last.
template <int size, class E>
__device__ __forceinline__ void rotate(E (&elements)[size], E last) {
#pragma unroll
  for (int e = 0; e + 1 < size; ++e) elements[e] = elements[e + 1];
  elements[size - 1] = last;
}

// dz goes through registers, where it is formed, and where its rows can be summed: the thread's packs of all tiles
// hold the same rows where it is transposed. They are summed in groups of 32, so that no sum is long.
template <class T, bool transposed, class Layout, int threads>
struct Carrier<Dz<T, transposed>, Layout, threads> {
  static constexpr int count = Layout::lines * Layout::packs / threads;
  static constexpr int tiles_of_group = 32 / count;
  Pack<T> grad_y[count], saved[count];
  Activation activation;
  float sums[Pack<T>::size] = {}, recent[Pack<T>::size] = {};
  int tiles = 0;

  __device__ __forceinline__ void start(T*, const Dz<T, transposed>& operand, const Window& window) {
    activation = operand.activation;
    each_pack<Layout, threads, T>([&](int i, int line, int column) {
      const int valid = window.valid<T>(line, column);
      const int64_t at = valid ? window.offset + line * operand.stride + column : 0;
      grad_y[i] = load(operand.grad_y + at, valid, operand.width);
      if (activation.kind != Activation::identity) saved[i] = load(operand.saved + at, valid, operand.width);
    });
  }

  __device__ __forceinline__ void finish(T* shared) {
    each_pack<Layout, threads, T>([&](int i, int line, int column) {
      Pack<T>& dz = grad_y[i];
      if (is_simple(activation)) {
        const bool is_relu = activation.kind == Activation::relu;
#pragma unroll
        for (int e = 0; e < Pack<T>::size; ++e)
          if (is_relu)
            store(&dz.elements[e], Relu{}.gradient(to_float(dz.elements[e]), to_float(saved[i].elements[e])));
        if constexpr (transposed)
#pragma unroll
          for (int e = 0; e < Pack<T>::size; ++e) recent[e] += to_float(dz.elements[e]);
      } else {
#pragma unroll 1
        for (int e = 0; e < Pack<T>::size; ++e) {  // always with the first, which then goes to the end
          const float first =
              differentiated(activation, to_float(dz.elements[0]), to_float(saved[i].elements[0]));
          T rounded;
          store(&rounded, first);
          rotate(dz.elements, rounded);
          rotate(saved[i].elements, rounded);
          if constexpr (transposed) rotate(recent, recent[0] + first);
        }
      }
      *reinterpret_cast<Pack<T>*>(shared + line * Layout::pitch + column) = dz;
    });
    if (transposed && ++tiles % tiles_of_group == 0) end_group();
  }

  __device__ __forceinline__ void end_group() {
#pragma unroll
    for (int e = 0; e < Pack<T>::size; ++e) {
      sums[e] += recent[e];
      recent[e] = 0.0f;
    }
  }

  // The sum of the tile's row threadIdx.x, for the threads that have one. `shared` is free, and all threads call it.
  __device__ __forceinline__ float row_sum(float* shared) {
    constexpr int rows = Layout::packs * Pack<T>::size, parts = threads / Layout::packs;
    end_group();
#pragma unroll
    for (int e = 0; e < Pack<T>::size; ++e) shared[threadIdx.x * Pack<T>::size + e] = sums[e];
    __syncthreads();
    float sum = 0.0f;
    for (int part = 0; part < parts && threadIdx.x < rows; ++part) sum += shared[part * rows + threadIdx.x];
    return sum;
  }
};

// ---- from the sums to memory

// Two neighbours at once.
__device__ __forceinline__ void store_pair(float* p, float first, float second) {
  *reinterpret_cast<float2*>(p) = {first, second};
}
template <class T>
__device__ __forceinline__ void store_pair(T* p, float first, float second) {
  struct {
    T first, second;
  } pair;
  store(&pair.first, first);
  store(&pair.second, second);
  *reinterpret_cast<uint32_t*>(p) = bit_cast<uint32_t>(pair);
}

// C [rows, columns], and db [rows]; either may be null. Where the sum is split, each split's own go to `partials`
// [splits, stride], C before db, and `reduce` makes the result of them.
template <class T>
struct Result {
  T* c;
  const T* bias;  // [columns], or null
  Activation activation;
  T* z;  // [rows, columns], or null
  T* row_sums;
  int64_t rows, columns;
  bool paired;  // pairs of C's elements can be stored at once
  float* partials;
  int64_t splits;

  __host__ __device__ int64_t size() const { return rows * columns; }
  __host__ __device__ int64_t stride() const { return (size() + rows + 1) / 2 * 2; }
  __device__ __forceinline__ float z_of(float sum, int64_t n) const {
    return sum + (bias ? to_float(bias[n]) : 0.0f);
  }
  // Of a simple activation.
  __device__ __forceinline__ float y_of(float sum, int64_t n) const {
    const float value = z_of(sum, n);
    return activation.kind == Activation::relu ? Relu{}(value) : value;
  }
  // y is g of z as it is stored, which backward may read. Returns y.
  __device__ __forceinline__ T write(T stored_z, int64_t at) const {
    if (z) z[at] = stored_z;
    T y;
    store(&y, activated(activation, to_float(stored_z)));
    if (c) c[at] = y;
    return y;
  }
};

// y = g(x Wᵀ + b) alone is the activation of a product.
template <class A, class B>
constexpr bool has_activation = !A::transposed && !B::transposed;

// Bound by tensor cores, or FMA, where the tiles are many and the sum is long; by the latency of a step where they are
// few, hence the splits; and by bandwidth where K or N is small.
template <template <class, class, class, class> class Math, class Tiling, class A, class B>
__global__ void __launch_bounds__(Tiling::threads, Tiling::blocks)
    product(const A a, const B b, const Result<typename A::T> result, int64_t K, int steps_of_split) {
  using T = typename A::T;
  using ALayout = Layout<T, A::transposed, Tiling::m>;
  using BLayout = Layout<T, B::transposed, Tiling::n>;
  constexpr int stages = Tiling::stages;
  T* const shared = reinterpret_cast<T*>(ptx::dynamic_shared_memory());

  const int64_t tiles_down = (result.rows + Tiling::m - 1) / Tiling::m;
  const int64_t split = blockIdx.x % result.splits, tile = blockIdx.x / result.splits;
  const int64_t m0 = tile % tiles_down * Tiling::m, n0 = tile / tiles_down * Tiling::n;
  const int64_t k0 = split * steps_of_split * depth<T>;
  const int64_t all_steps = (K - k0 + depth<T> - 1) / depth<T>;
  const int steps = static_cast<int>(all_steps < steps_of_split ? all_steps : steps_of_split);

  Carrier<A, ALayout, Tiling::threads> a_carrier;
  Carrier<B, BLayout, Tiling::threads> b_carrier;
  Math<T, Tiling, ALayout, BLayout> math;
  const auto a_tile = [&](int step) { return shared + step % stages * (ALayout::size + BLayout::size); };
  const auto b_tile = [&](int step) { return a_tile(step) + ALayout::size; };
  const auto start = [&](int step) {
    if (step < steps) {
      const int64_t k = k0 + int64_t{step} * depth<T>;
      a_carrier.start(a_tile(step), a, Window(a, m0, k, K));
      b_carrier.start(b_tile(step), b, Window(b, n0, k, K));
    }
    ptx::commit_copies();
  };
  const auto finish = [&](int step) {
    if (step >= steps) return;
    a_carrier.finish(a_tile(step));
    b_carrier.finish(b_tile(step));
  };

  for (int step = 0; step < stages - 1; ++step) {
    start(step);
    finish(step);
  }
  for (int step = 0; step < steps; ++step) {
    ptx::wait_for_copies<stages - 2>();
    if constexpr (A::transposed) b_carrier.activate(b_tile(step), b);
    __syncthreads();  // the step's tiles are there, and those of the step before are free
    start(step + stages - 1);
    math.multiply(a_tile(step), b_tile(step));
    finish(step + stages - 1);
  }

  float* const partials = result.partials + split * result.stride();
  if (has_activation<A, B> && result.splits == 1 && !is_simple(result.activation)) {
    __syncthreads();  // the operands' tiles have been read, and z takes their place
    math.each_pair([&](int row, int column, float first, float second) {
      if (n0 + column < result.columns)
        store(shared + row * Tiling::n + column, result.z_of(first, n0 + column));
      if (n0 + column + 1 < result.columns)
        store(shared + row * Tiling::n + column + 1, result.z_of(second, n0 + column + 1));
    });
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < Tiling::m * Tiling::n; i += Tiling::threads) {
      const int64_t m = m0 + i / Tiling::n, n = n0 + i % Tiling::n;
      if (m < result.rows && n < result.columns) result.write(shared[i], m * result.columns + n);
    }
  } else if (result.c) {
    math.each_pair([&](int row, int column, float first, float second) {
      const int64_t m = m0 + row, n = n0 + column;
      if (m >= result.rows || n >= result.columns) return;
      const int64_t at = m * result.columns + n;
      const bool whole = n + 1 < result.columns;
      if (result.splits > 1) {
        partials[at] = first;
        if (whole) partials[at + 1] = second;
        return;
      }
      first = result.y_of(first, n);
      if (whole) second = result.y_of(second, n + 1);
      if (whole && result.paired) return store_pair(result.c + at, first, second);
      store(result.c + at, first);
      if (whole) store(result.c + at + 1, second);
    });
  }
  if constexpr (A::transposed) {
    if (result.row_sums && n0 == 0) {
      __syncthreads();
      const float sum = a_carrier.row_sum(reinterpret_cast<float*>(shared));
      const int64_t m = m0 + threadIdx.x;
      if (threadIdx.x >= Tiling::m || m >= result.rows) return;
      if (result.splits > 1) partials[result.size() + m] = sum;
      else store(result.row_sums + m, sum);
    }
  }
}

// The splits' sums, added in their order. Bound by bandwidth.
template <class T>
__global__ void __launch_bounds__(256) reduce(const Result<T> result) {
  const int64_t i = blockIdx.x * int64_t{256} + threadIdx.x;
  const bool of_c = i < result.size();
  if (i >= result.size() + result.rows || !(of_c ? result.c : result.row_sums)) return;
  float sum = 0.0f;
  for (int64_t split = 0; split < result.splits; ++split) sum += result.partials[split * result.stride() + i];
  T stored_z;
  if (of_c) store(&stored_z, result.z_of(sum, i % result.columns)), result.write(stored_z, i);
  else store(result.row_sums + (i - result.size()), sum);
}

template <template <class, class, class, class> class Math, class Tiling, class A, class B>
cudaError_t multiply(const A& a, const B& b, const Result<typename A::T>& result, int64_t K,
                     cudaStream_t stream) {
  using T = typename A::T;
  constexpr int stage = Layout<T, A::transposed, Tiling::m>::size + Layout<T, B::transposed, Tiling::n>::size;
  constexpr int tile = has_activation<A, B> ? Tiling::m * Tiling::n : 0;
  const int64_t across = (result.columns + Tiling::n - 1) / Tiling::n;
  // Without C, as where it has no columns, only db is wanted, which the first tile of each row sums.
  const int64_t tiles = (result.rows + Tiling::m - 1) / Tiling::m * (result.c && across ? across : 1);
  const int64_t steps = (K + depth<T> - 1) / depth<T>;
  const cudaError_t error = launch_with<product<Math, Tiling, A, B>>(
      sizeof(T) * std::max(stage * Tiling::stages, tile), tiles * result.splits, Tiling::threads, stream, a,
      b, result, K, static_cast<int>((steps + result.splits - 1) / result.splits));
  if (error != cudaSuccess || result.splits == 1) return error;
  return launch(reduce<T>, (result.size() + result.rows + 255) / 256, 256, stream, result);
}

}  // namespace fastmlp::cuda
