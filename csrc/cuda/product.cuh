// The three products of a layer are one kernel, which takes the operands as they lie in memory:
//
//   C[m][n] = Σ_k A(m, k) B(n, k)
//
//   y  = g(x Wᵀ + b)     A = x       B = W
//   dx = dz W            A = dz      B = Wᵀ     C is the dz of the layer below, where g' of that is given
//   dW = dzᵀ x           A = dzᵀ     B = xᵀ     db[m] = Σ_k A(m, k)
//
// What computes the product of two tiles is a parameter: tensor_core.cuh, or simt.cuh. All sums are in float32 and in
// an order that the shape alone decides, so the same input gives the same bits on the same GPU. Tensor cores add up the
// products of one instruction in ways that differ from generation to generation.
#pragma once

#include <algorithm>

#include "pack.cuh"
#include "ptx.cuh"
#include "splits.cuh"

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

// An operand's tile in shared memory, in lines as in memory. A line of one row holds its `depth` elements along the sum;
// transposed, a line of one k holds the elements of all rows. Where its packs are puts those that a warp reads or writes
// at once on different banks: a line of one row has them swapped by its number, of one k it is longer than its elements.
template <class T, bool transposed_, int rows>
struct Layout {
  static constexpr bool transposed = transposed_;
  static constexpr int lines = transposed ? depth<T> : rows;
  static constexpr int packs = (transposed ? rows : depth<T>) / Pack<T>::size;  // of a line
  static constexpr int pitch = packs * Pack<T>::size + (transposed ? 8 : 0);
  static constexpr int size = lines * pitch;

  static __device__ __forceinline__ int at(int line, int column) {
    return line * pitch + (transposed ? column : column ^ line / 2 % 4 * Pack<T>::size);
  }
};

// An operand in memory: A(row, k) at data[row * stride + k], or transposed at data[k * stride + row].
template <class T_, bool transposed_>
struct Operand {
  using T = T_;
  static constexpr bool transposed = transposed_;
  const T* data;
  int64_t stride, rows;
};

// Brings tiles of an operand to shared memory, one after the other along the sum, by copies of `width` bytes that are
// inside the operand or outside of it. A thread has packs in one column, some lines from each other.
template <class Operand, class Layout, int threads, int width>
struct Carrier {
  using T = typename Operand::T;
  static constexpr bool transposed = Operand::transposed;
  static constexpr int count = Layout::lines * Layout::packs / threads, apart = threads / Layout::packs;
  static_assert(count * threads == Layout::lines * Layout::packs && apart * Layout::packs == threads);
  static_assert(transposed || apart % 8 == 0);  // lines whose packs are swapped alike
  const T* from;                                // the thread's first pack of the next tile
  int64_t stride;
  int lines, columns;  // that are left from there on
  int to;

  __device__ __forceinline__ Carrier(const Operand& operand, int64_t row0, int64_t k0, int K)
      : stride(operand.stride) {
    const int line = threadIdx.x / Layout::packs, column = threadIdx.x % Layout::packs * Pack<T>::size;
    const int64_t left = operand.rows - row0;
    const int rows = left < 1024 ? int(left) : 1024;  // more than a tile has
    from = operand.data + (transposed ? k0 + line : row0 + line) * stride + (transposed ? row0 : k0) + column;
    lines = (transposed ? K : rows) - line;
    columns = (transposed ? rows : K) - column;
    to = Layout::at(line, column);
  }

  __device__ __forceinline__ void start(T* shared) {
    constexpr int step = width > int(sizeof(T)) ? width / int(sizeof(T)) : 1;
#pragma unroll
    for (int i = 0; i < count; ++i)
#pragma unroll
      for (int e = 0; e < Pack<T>::size; e += step) {
        const bool inside = i * apart < lines && e < columns;
        T* const own = shared + to + i * apart * Layout::pitch + e;
        if constexpr (width >= 4) ptx::copy_async<width>(own, from + i * apart * stride + e, inside);
        else *own = inside ? from[i * apart * stride + e] : T{};  // there are no such copies
      }
    from += transposed ? depth<T> * stride : depth<T>;
    (transposed ? lines : columns) -= depth<T>;
  }
};

// ---- from the sums to memory

// What a product is for, by how its operands lie.
enum class Pass { forward, dx, dW };
template <class A, class B>
constexpr Pass pass_of = A::transposed   ? Pass::dW
                         : B::transposed ? Pass::dx
                                         : Pass::forward;

// What becomes of C [rows, columns]:
//   forward    y = g(C), and z = C beside it, where that is wanted
//   dx         dz = C · g' of what the layer below has saved, and its y beside it, where that is wanted
template <class T>
struct Result {
  T* c;           // null where it is not wanted
  const T* bias;  // [columns], or null
  Activation activation;
  const T* saved;  // [rows, columns], or null, where C is dx
  T* beside;       // [rows, columns], or null
  T* row_sums;     // [rows], or null
  int64_t rows, columns;
  bool aligned;  // whole packs can be loaded and stored

  __device__ __forceinline__ float bias_of(int64_t n) const {
    return bias && n < columns ? to_float(bias[n]) : 0.0f;
  }
  __device__ __forceinline__ Pack<T> saved_at(int64_t at, int64_t left) const {
    return saved ? load(saved + at, left, aligned) : Pack<T>{};
  }
  template <Pass pass, bool simple>
  __device__ __forceinline__ void finish(Pack<T>& pack, Pack<T> saved_pack, int64_t at, int64_t left) const {
    if (pass == Pass::forward) {
      if (beside) store(beside + at, pack, left, aligned);
      activate<simple>(pack, activation);
    } else if (pass == Pass::dx && saved) {
      differentiate<simple>(pack, saved_pack, activation, beside);
      if (beside) store(beside + at, saved_pack, left, aligned);
    }
    if (c) store(c + at, pack, left, aligned);
  }
};

// A tile of C, of which read(row, column) gives a pack of sums as they are rounded, in shared memory after a barrier;
// keep(row, column, pack) is told what becomes of it. What is read from memory for the simple activations is on its way
// before the first pack is stored.
template <class Tiling, Pass pass, class T, class Read, class Keep>
__device__ __forceinline__ void finish_tile(const Result<T>& result, int64_t m0, int64_t n0, Read read,
                                            Keep keep) {
  constexpr int packs = Tiling::n / Pack<T>::size, apart = Tiling::threads / packs, count = Tiling::m / apart;
  const int row0 = threadIdx.x / packs, column = threadIdx.x % packs * Pack<T>::size;
  const int64_t left = result.columns - n0 - column, first = (m0 + row0) * result.columns + n0 + column;
  const auto is_inside = [&](int i) { return m0 + row0 + i * apart < result.rows && left > 0; };
  const auto at = [&](int i) { return first + i * apart * result.columns; };
  if (pass == Pass::dW || is_simple(result.activation)) {
    Pack<T> saved[count];
    if (pass == Pass::dx)
#pragma unroll
      for (int i = 0; i < count; ++i)
        if (is_inside(i)) saved[i] = result.saved_at(at(i), left);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < count; ++i) {
      Pack<T> pack = read(row0 + i * apart, column);
      if (is_inside(i)) result.template finish<pass, true>(pack, saved[i], at(i), left);
      keep(row0 + i * apart, column, pack);
    }
  } else {
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      Pack<T> pack = read(row0 + i * apart, column);
      if (is_inside(i)) result.template finish<pass, false>(pack, result.saved_at(at(i), left), at(i), left);
      keep(row0 + i * apart, column, pack);
    }
  }
}

// Bound by tensor cores, or FMA, where the tiles are many and the sum is long; by the latency of a step where they are
// few, hence the splits; and by bandwidth where K or N is small.
template <template <class, class, class, class> class Math, class Tiling, int width, class A, class B>
__global__ void __launch_bounds__(Tiling::threads, Tiling::blocks)
    product(const A a, const B b, const Result<typename A::T> result, const Splits splits, int64_t K,
            unsigned tiles_down) {
  using T = typename A::T;
  using ALayout = Layout<T, A::transposed, Tiling::m>;
  using BLayout = Layout<T, B::transposed, Tiling::n>;
  constexpr int stages = Tiling::stages;
  T* const shared = reinterpret_cast<T*>(ptx::dynamic_shared_memory());
  float* const shared_sums = reinterpret_cast<float*>(shared);

  const unsigned split = blockIdx.x % splits.count, tile = blockIdx.x / splits.count;
  const int64_t m0 = int64_t{tile % tiles_down} * Tiling::m, n0 = int64_t{tile / tiles_down} * Tiling::n;
  const int64_t k0 = int64_t{split} * splits.steps * depth<T>, left = K - k0;
  const int own = left < int64_t{splits.steps} * depth<T> ? int(left) : splits.steps * depth<T>;
  const int steps = (own + depth<T> - 1) / depth<T>;

  Carrier<A, ALayout, Tiling::threads, width> a_carrier(a, m0, k0, own);
  Carrier<B, BLayout, Tiling::threads, width> b_carrier(b, n0, k0, own);
  const auto a_tile = [&](int step) { return shared + step % stages * (ALayout::size + BLayout::size); };
  const auto b_tile = [&](int step) { return a_tile(step) + ALayout::size; };
  const auto start = [&](int step) {
    if (step < steps) {
      a_carrier.start(a_tile(step));
      b_carrier.start(b_tile(step));
    }
    ptx::commit_copies();
  };
  wait_for_previous();
  for (int step = 0; step < stages - 1; ++step) start(step);

  Math<T, Tiling, ALayout, BLayout> math;
  math.begin([&](int column) { return split == 0 ? result.bias_of(n0 + column) : 0.0f; });
  // Of dz alone; the threads share a row's steps out, and what rounding takes from their sums is put back (Kahan).
  constexpr int parts = Tiling::threads / Tiling::m;
  const bool sums_rows = A::transposed && result.row_sums && n0 == 0;
  float row_sum = 0.0f, lost = 0.0f;
  const auto add_rows = [&](const T* tile) {
    float sum = -lost;
#pragma unroll
    for (int k = 0; k < depth<T>; k += parts)
      sum += to_float(tile[(k + threadIdx.x / Tiling::m) * ALayout::pitch + threadIdx.x % Tiling::m]);
    const float next = row_sum + sum;
    lost = (next - row_sum) - sum;
    row_sum = next;
  };
  for (int step = 0; step < steps; ++step) {
    ptx::wait_for_copies<stages - 2>();
    __syncthreads();  // the step's tiles are there, and those of the step before are free
    start(step + stages - 1);
    math.multiply(a_tile(step), b_tile(step));
    if constexpr (A::transposed)
      if (sums_rows) add_rows(a_tile(step));
  }

  let_next_begin();
  __syncthreads();  // the operands' tiles have been read: sums take their place
  if (sums_rows) {
    shared_sums[threadIdx.x] = row_sum;
    __syncthreads();
    for (int part = 1; part < parts; ++part)
      row_sum += shared_sums[threadIdx.x % Tiling::m + part * Tiling::m];
    __syncthreads();
  }
  constexpr int sums_of_thread = Tiling::m * Tiling::n / Tiling::threads;
  if (!add_splits<Tiling::threads, sums_of_thread / 4>(math.sums, row_sum, splits, tile, split)) return;
  if (sums_rows && threadIdx.x < Tiling::m && m0 + threadIdx.x < result.rows)
    store(result.row_sums + m0 + threadIdx.x, row_sum);

  constexpr int pitch = Tiling::n + math.padding;
  math.each_pair([&](int row, int column, float first, float second) {
    store_pair(shared_sums + row * pitch + column, first, second);
  });
  const auto read = [&](int row, int column) {
    Pack<T> pack;
#pragma unroll
    for (int e = 0; e < Pack<T>::size; e += 4) {
      const float4 sums = *reinterpret_cast<const float4*>(shared_sums + row * pitch + column + e);
      store_pair(pack.elements + e, sums.x, sums.y);
      store_pair(pack.elements + e + 2, sums.z, sums.w);
    }
    return pack;
  };
  finish_tile<Tiling, pass_of<A, B>>(result, m0, n0, read, [](int, int, Pack<T>&) {});
}

template <template <class, class, class, class> class Math, class Tiling, int width, class A, class B>
cudaError_t multiply(const A& a, const B& b, const Result<typename A::T>& result, int64_t K, const Cut& cut,
                     void* memory, cudaStream_t stream) {
  using T = typename A::T;
  using ALayout = Layout<T, A::transposed, Tiling::m>;
  using BLayout = Layout<T, B::transposed, Tiling::n>;
  constexpr int padding = Math<T, Tiling, ALayout, BLayout>::padding;
  constexpr size_t bytes = std::max(sizeof(T) * (ALayout::size + BLayout::size) * Tiling::stages,
                                    sizeof(float) * Tiling::m * (Tiling::n + padding));
  const Splits splits(cut, memory);
  return launch_with<product<Math, Tiling, width, A, B>>(
      bytes, cut.tiles * cut.splits, Tiling::threads, stream, a, b, result, splits, K,
      static_cast<unsigned>(blocks_of(result.rows, Tiling::m)));
}

}  // namespace fastmlp::cuda
