// Products of small matrices, for which tensor cores and tiles in shared memory would be too large: tiles of 4 x 4 sums, or
// of 8 x 4, each of which some lanes of a warp share. They load 4 terms of a row at a time, and add up what they have at the
// end, in an order that the number of lanes decides.
//
// Bound by latency, and long sums by loads: 12 of 16 bytes are to 128 multiply-adds, which take 48 and 32 cycles of a
// multiprocessor.
#pragma once

#include "pack.cuh"
#include "step_plan.h"

namespace fastmlp::cuda {

constexpr int tile = 4;
static_assert(tile == Pack<float>::size);

__device__ __forceinline__ int tiles_of(int n) { return (n + tile - 1) / tile; }

// Rows of packs; or, where they are not aligned, of so many columns that are loaded one by one.
struct Rows {
  const float* data;
  int64_t ld;
  int columns;
  bool packed;
  __device__ __forceinline__ const float* at(int row, int column) const { return data + row * ld + column; }
};
__host__ __device__ __forceinline__ Rows rows_of(const float* data, int64_t ld, int columns) {
  const bool packed = reinterpret_cast<uintptr_t>(data) % 16 == 0 && ld % tile == 0 && columns % tile == 0;
  return {data, ld, columns, packed};
}

// Of a row, of which n elements are left, or a pack.
template <bool packed>
__device__ __forceinline__ Pack<float> load_pack(const float* p, int n) {
  if constexpr (packed) {
    return *reinterpret_cast<const Pack<float>*>(p);
  } else {
    Pack<float> pack;
#pragma unroll
    for (int e = 0; e < tile; ++e) pack.elements[e] = e < n ? p[e] : 0.0f;
    return pack;
  }
}

// The sums of a tile, row by row.
template <int height = tile>
struct Sums {
  static constexpr int size = height * tile;
  float own[size] = {};

  // Adds up those of 2 · step lanes: each ends with the next `count` / (2 · step) of them, in own[0] and behind.
  template <int step, int count = size>
  __device__ __forceinline__ void add_up() {
    if constexpr (step > 0 && count > 1) {
      const bool upper = threadIdx.x & step;
#pragma unroll
      for (int e = 0; e < count / 2; ++e) {
        const float other = __shfl_xor_sync(0xffffffff, upper ? own[e] : own[count / 2 + e], step);
        own[e] = (upper ? own[count / 2 + e] : own[e]) + other;
      }
      add_up<step / 2, count / 2>();
    } else if constexpr (step > 0) {
      own[0] += __shfl_xor_sync(0xffffffff, own[0], step);
      add_up<step / 2, 1>();
    }
  }
};

// Shares tiles [rows, columns] out over the block, each to so many lanes of a warp. Calls f(row, column, exists) with the
// numbers of a tile: of those that do not exist too, for all lanes of a warp to stay together.
template <class F>
__device__ __forceinline__ void for_tiles(int lanes, int rows, int columns, F f) {
  for (int first = threadIdx.x / 32 * (32 / lanes); first < rows * columns; first += blockDim.x / lanes) {
    const int own = first + threadIdx.x % 32 / lanes, index = min(own, rows * columns - 1);
    f(index / columns, index % columns, own < rows * columns);
  }
}

// sums[i, j] = Σ_k a[i0 + i, k] b[j0 + j, k], of which each of the lanes adds some; then it has one or two, which it returns.
template <int lanes, int height, bool packed>
__device__ __forceinline__ float2 multiply(const Rows& a, int i0, int a_rows, const Rows& b, int j0,
                                           int b_rows, int K) {
  static_assert(2 * lanes >= Sums<height>::size);
  const float *left[height], *right[tile];
#pragma unroll
  for (int i = 0; i < height; ++i) left[i] = a.at(min(i0 + i, a_rows - 1), 0);
#pragma unroll
  for (int j = 0; j < tile; ++j) right[j] = b.at(min(j0 + j, b_rows - 1), 0);
  Sums<height> sums;
#pragma unroll(packed&& height == tile ? 2 : 1)
  for (int k = threadIdx.x % lanes * tile; k < K; k += lanes * tile) {
    Pack<float> l[height], r[tile];
#pragma unroll
    for (int i = 0; i < height; ++i) l[i] = load_pack<packed>(left[i] + k, K - k);
#pragma unroll
    for (int j = 0; j < tile; ++j) r[j] = load_pack<true>(right[j] + k, tile);
#pragma unroll
    for (int e = 0; e < tile; ++e)
#pragma unroll
      for (int i = 0; i < Sums<height>::size; ++i)
        sums.own[i] += l[i / tile].elements[e] * r[i % tile].elements[e];
  }
  sums.template add_up<lanes / 2>();
  return {sums.own[0], sums.own[1]};
}
template <bool packed>
__device__ __forceinline__ float2 multiply(int lanes, int height, const Rows& a, int i0, int a_rows,
                                           const Rows& b, int j0, int b_rows, int K) {
  return height == 8   ? multiply<32, 8, packed>(a, i0, a_rows, b, j0, b_rows, K)
         : lanes == 32 ? multiply<32, 4, packed>(a, i0, a_rows, b, j0, b_rows, K)
                       : multiply<8, 4, packed>(a, i0, a_rows, b, j0, b_rows, K);
}

// Calls f(i, j, Σ_k a[i, k] b[j, k], beside(i, j)) once for each of so many rows of a and b. K alone decides how many lanes
// share a sum. What is beside it is loaded before, so that nobody waits for it. Those of b are packed, and of a where
// `packed`.
template <bool packed, class Beside, class F>
__device__ __forceinline__ void multiply(const Rows& a, int a_rows, const Rows& b, int b_rows, int K,
                                         Beside beside, F f) {
  const int lanes = K < whole_step::long_sum ? 8 : 32, height = lanes == 32 && a_rows > 4 ? 8 : 4,
            size = height * tile;
  const int at = threadIdx.x % lanes * size / lanes;
  const bool is_first = threadIdx.x % lanes * size % lanes == 0;  // of those with the same sum
  for_tiles(lanes, (a_rows + height - 1) / height, tiles_of(b_rows), [&](int row, int column, bool exists) {
    const int i0 = row * height, j0 = column * tile, i = i0 + at / tile, j = j0 + at % tile;
    const int count = exists && is_first && i < a_rows ? min(b_rows - j, max(size / lanes, 1)) : 0;
    const float2 others{count > 0 ? beside(i, j) : 0.0f, count > 1 ? beside(i, j + 1) : 0.0f};
    const float2 sums = packed || a.packed ? multiply<true>(lanes, height, a, i0, a_rows, b, j0, b_rows, K)
                                           : multiply<false>(lanes, height, a, i0, a_rows, b, j0, b_rows, K);
#pragma unroll 1
    for (int e = 0; e < count; ++e) f(i, j + e, e ? sums.y : sums.x, e ? others.y : others.x);
  });
}

// sums[i, j] = Σ_m a[m, i] b[m, j] of a tile that begins where a and b do, of which each of four lanes adds some. Without b
// the first column is Σ_m a[m, i], and the others are 0.
template <bool packed>
__device__ __forceinline__ void multiply_transposed(const Rows& a, const Rows& b, int M, Sums<>& sums) {
#pragma unroll 2
  for (int m0 = threadIdx.x % tile * tile; m0 < M; m0 += tile * tile) {
    Pack<float> l[tile], r[tile];
#pragma unroll
    for (int e = 0; e < tile; ++e) {
      const int m = m0 + e;
      l[e] = m < M ? load_pack<true>(a.at(m, 0), tile) : Pack<float>{};
      r[e] = m < M && b.data ? load_pack<packed>(b.at(m, 0), b.columns) : Pack<float>{b.data ? 0.0f : 1.0f};
    }
#pragma unroll
    for (int e = 0; e < tile; ++e)
#pragma unroll
      for (int i = 0; i < tile * tile; ++i) sums.own[i] += l[e].elements[i / tile] * r[e].elements[i % tile];
  }
}

}  // namespace fastmlp::cuda
