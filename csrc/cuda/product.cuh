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
template <int m_, int n_, int warp_m_, int warp_n_, int stages_>
struct Tiling {
  static constexpr int m = m_, n = n_, warp_m = warp_m_, warp_n = warp_n_, stages = stages_;
  static constexpr int warps_across = n / warp_n;
  static constexpr int threads = 32 * (m / warp_m) * warps_across;
};

// Steps of the sum in a stage: 64 bytes of them.
template <class T>
constexpr int depth = 64 / sizeof(T);

// An operand's tile in shared memory, in lines as in memory. A line of one row holds its `depth` elements along the sum;
// transposed, a line of one k holds the elements of all rows. Its number swaps the elements of a line, so that those that
// a warp reads or writes at once, a pack from each of 8 lines or 8 floats from each of 4, are on different banks.
template <class T, bool transposed_, int rows>
struct Layout {
  static constexpr bool transposed = transposed_;
  static constexpr int lines = transposed ? depth<T> : rows, length = transposed ? rows : depth<T>;
  static constexpr int size = lines * length;

  static __device__ __forceinline__ int at(int line, int column) {
    const int swap = transposed ? line % Pack<T>::size * 8 : (line & 2 | line / 4 % 2) * Pack<T>::size;
    return line * length + (column ^ swap);
  }
};

// Where a tile of C is in shared memory on its way to global memory, in the same manner: a warp has packs, or halves of two
// neighbours, of rows that are so far apart.
template <class T, int columns, int apart>
__device__ __forceinline__ int staged_at(int row, int column) {
  const int swap = row / apart % 4 * 2 + row / apart / 4 % 2;
  return row * columns + (column ^ swap * Pack<T>::size);
}

// An operand in memory: A(row, k) at data[row * stride + k], or transposed at data[k * stride + row].
template <class T_, bool transposed_>
struct Operand {
  using T = T_;
  static constexpr bool transposed = transposed_;
  const T* data;
  int64_t stride, rows;
};

// Brings tiles of an operand to shared memory, one after the other along the sum, by copies of `width` bytes that are
// inside the operand or outside of it. A thread has copies in one column, some lines from each other: of 4 bytes or more,
// which it shares with no other.
template <class Operand, class Layout, int threads, int width>
struct Carrier {
  using T = typename Operand::T;
  static constexpr bool transposed = Operand::transposed;
  static constexpr int size = std::max(width, 4) / int(sizeof(T)), across = Layout::length / size,
                       apart = threads / across;
  static constexpr int count = Layout::lines / apart;
  static_assert(across * apart == threads && apart * count == Layout::lines);
  const T* from;  // the thread's first elements of the next tile
  int64_t stride;
  int rows;  // of the operand, from the tile's first on

  static __device__ __forceinline__ int line() { return threadIdx.x / across; }
  static __device__ __forceinline__ int column() { return threadIdx.x % across * size; }

  __device__ __forceinline__ Carrier(const Operand& operand, int64_t row0, int64_t k0)
      : stride(operand.stride) {
    const int64_t left = operand.rows - row0, line0 = transposed ? k0 : row0,
                  column0 = transposed ? row0 : k0;
    rows = left < 1024 ? int(left) : 1024;  // more than a tile has
    from = operand.data + (line0 + line()) * stride + column0 + column();
  }

  // The next tile, from which on K steps of the sum are left.
  __device__ __forceinline__ void start(T* shared, int K) {
    const int lines = transposed ? K : rows, columns = transposed ? rows : K;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const T* const own = from + i * apart * stride;
      T* const to = shared + Layout::at(line() + i * apart, column());
      const int left = line() + i * apart < lines ? columns - column() : 0;
      if constexpr (width >= 4) ptx::copy_async<width>(to, own, left > 0);
      else  // there are no such copies
        store(to, {left > 0 ? to_float(own[0]) : 0.0f, left > 1 ? to_float(own[1]) : 0.0f});
    }
    from += transposed ? depth<T> * stride : depth<T>;
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

// A tile of C, whose sums are, as they are rounded, in shared memory at place(row, column) after a barrier; keep(pack, its
// place, column) is told what becomes of them. What is read from memory for the simple activations is on its way before
// the first pack is stored.
template <class Tiling, Pass pass, class T, class Place, class Keep>
__device__ __forceinline__ void finish_tile(const Result<T>& result, int64_t m0, int64_t n0, Place place,
                                            Keep keep) {
  constexpr int packs = Tiling::n / Pack<T>::size, apart = Tiling::threads / packs, count = Tiling::m / apart;
  const int row0 = threadIdx.x / packs, column = threadIdx.x % packs * Pack<T>::size;
  const int64_t left = result.columns - n0 - column, first = (m0 + row0) * result.columns + n0 + column;
  const auto is_inside = [&](int i) { return m0 + row0 + i * apart < result.rows && left > 0; };
  const auto at = [&](int i) { return first + i * apart * result.columns; };
  const auto own = [&](int i) { return reinterpret_cast<Pack<T>*>(place(row0 + i * apart, column)); };
  if (pass == Pass::dW || is_simple(result.activation)) {
    Pack<T> saved[count];
    if (pass == Pass::dx)
#pragma unroll
      for (int i = 0; i < count; ++i)
        if (is_inside(i)) saved[i] = result.saved_at(at(i), left);
    __syncthreads();
    constexpr int unrolled = pass == Pass::dx ? count : 4;  // more of them would take registers from the sums
#pragma unroll unrolled
    for (int i = 0; i < count; ++i) {
      Pack<T> pack = *own(i);
      if (is_inside(i)) result.template finish<pass, true>(pack, saved[i], at(i), left);
      keep(pack, own(i), column);
    }
  } else {
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      Pack<T> pack = *own(i);
      if (is_inside(i)) result.template finish<pass, false>(pack, result.saved_at(at(i), left), at(i), left);
      keep(pack, own(i), column);
    }
  }
}

template <class Tiling, class T>
constexpr int64_t product_bytes =
    sizeof(T) * std::max((Tiling::m + Tiling::n) * depth<T> * Tiling::stages, Tiling::m* Tiling::n);

template <template <class, class, class, class> class Math, class Tiling, class A, class B>
using MathOf = Math<typename A::T, Tiling, Layout<typename A::T, A::transposed, Tiling::m>,
                    Layout<typename B::T, B::transposed, Tiling::n>>;

// Bound by tensor cores, or FMA, where the tiles are many and the sum is long; by the latency of a step where they are
// few, hence the splits; and by bandwidth where K or N is small.
template <template <class, class, class, class> class Math, class Tiling, int width, class A, class B>
__global__ void __launch_bounds__(Tiling::threads, MathOf<Math, Tiling, A, B>::blocks)
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

  Carrier<A, ALayout, Tiling::threads, width> a_carrier(a, m0, k0);
  Carrier<B, BLayout, Tiling::threads, width> b_carrier(b, n0, k0);
  const auto a_tile = [&](int step) { return shared + step % stages * (ALayout::size + BLayout::size); };
  const auto b_tile = [&](int step) { return a_tile(step) + ALayout::size; };
  const auto start = [&](int step) {
    if (step < steps) {
      a_carrier.start(a_tile(step), own - step * depth<T>);
      b_carrier.start(b_tile(step), own - step * depth<T>);
    }
    ptx::commit_copies();
  };
  wait_for_previous();
  for (int step = 0; step < stages - 1; ++step) start(step);

  MathOf<Math, Tiling, A, B> math;
  math.begin([&](int column) {
    return pass_of<A, B> == Pass::forward && split == 0 ? result.bias_of(n0 + column) : 0.0f;
  });
  // Of dz alone; the threads share a row's steps out, and what rounding takes from their sums is put back (Kahan).
  constexpr int parts = Tiling::threads / Tiling::m;
  const bool sums_rows = A::transposed && result.row_sums && n0 == 0;
  float row_sum = 0.0f, lost = 0.0f;
  const auto add_rows = [&](const T* tile) {
    float sum = -lost;
#pragma unroll
    for (int k = 0; k < depth<T>; k += parts)
      sum += to_float(tile[ALayout::at(k + threadIdx.x / Tiling::m, threadIdx.x % Tiling::m)]);
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

  const auto place = [&](int row, int column) {
    return shared + staged_at<T, Tiling::n, math.rows_apart>(row, column);
  };
  math.each([&](int row, int column, const auto& sums) { store(place(row, column), sums); });
  finish_tile<Tiling, pass_of<A, B>>(result, m0, n0, place, [](const Pack<T>&, Pack<T>*, int) {});
}

template <template <class, class, class, class> class Math, class Tiling, int width, class A, class B>
cudaError_t multiply(const A& a, const B& b, const Result<typename A::T>& result, int64_t K, const Cut& cut,
                     void* memory, cudaStream_t stream) {
  return launch_with<product<Math, Tiling, width, A, B>>(
      product_bytes<Tiling, typename A::T>, cut.tiles * cut.splits, Tiling::threads, stream, a, b, result,
      Splits(cut, memory), K, static_cast<unsigned>(blocks_of(result.rows, Tiling::m)));
}

}  // namespace fastmlp::cuda
