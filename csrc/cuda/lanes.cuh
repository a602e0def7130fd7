// Products of small matrices, for which tensor cores and tiles in shared memory would be too large: tiles of 4 x 4 sums,
// each of which some lanes of a warp share. They load 4 terms of a row at a time, and add up what they have at the end,
// in an order that the number of lanes decides.
//
// Bound by latency: eight loads of 16 bytes are to 64 multiply-adds, and several such steps are under way at once.
#pragma once

#include "pack.cuh"

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
struct Sums {
  float own[tile * tile] = {};

  // Adds up those of 2 · step lanes: each ends with the next `count` / (2 · step) of them, in own[0] and behind.
  template <int step, int count = tile * tile>
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

// Shares tiles [rows, columns] out over the block, each to so many lanes of a warp. Calls f(row, column, exists): of tiles
// that do not exist too, for all lanes of a warp to stay together.
template <int lanes, class F>
__device__ __forceinline__ void for_tiles(int rows, int columns, F f) {
  for (int first = threadIdx.x / 32 * (32 / lanes); first < rows * columns; first += blockDim.x / lanes) {
    const int own = first + threadIdx.x % 32 / lanes, index = min(own, rows * columns - 1);
    f(index / columns * tile, index % columns * tile, own < rows * columns);
  }
}

// sums[i, j] = Σ_k a[i, k] b[j, k], of which each of the lanes adds some.
template <int lanes, bool packed>
__device__ __forceinline__ void multiply(const float* const (&a)[tile], const float* const (&b)[tile], int K,
                                         Sums& sums) {
#pragma unroll 4
  for (int k = threadIdx.x % lanes * tile; k < K; k += lanes * tile) {
    Pack<float> l[tile], r[tile];
#pragma unroll
    for (int i = 0; i < tile; ++i)
      l[i] = load_pack<packed>(a[i] + k, K - k), r[i] = load_pack<packed>(b[i] + k, K - k);
#pragma unroll
    for (int e = 0; e < tile; ++e)
#pragma unroll
      for (int i = 0; i < tile * tile; ++i) sums.own[i] += l[i / tile].elements[e] * r[i % tile].elements[e];
  }
}

// Calls f(i, j, Σ_k a[i, k] b[j, k]) once for each of so many rows of a and b.
template <int lanes, class F>
__device__ __forceinline__ void multiply(const Rows& a, int a_rows, const Rows& b, int b_rows, int K, F f) {
  static_assert(lanes >= tile * tile / 2);
  const int at = threadIdx.x % lanes * tile * tile / lanes;
  const bool is_first = threadIdx.x % lanes * tile * tile % lanes == 0;  // of those with the same sum
  for_tiles<lanes>(tiles_of(a_rows), tiles_of(b_rows), [&](int i0, int j0, bool exists) {
    const float *left[tile], *right[tile];
#pragma unroll
    for (int i = 0; i < tile; ++i)
      left[i] = a.at(min(i0 + i, a_rows - 1), 0), right[i] = b.at(min(j0 + i, b_rows - 1), 0);
    Sums sums;
    if (a.packed && b.packed) multiply<lanes, true>(left, right, K, sums);
    else multiply<lanes, false>(left, right, K, sums);
    sums.add_up<lanes / 2>();
#pragma unroll 1
    for (int e = at; e < max(at + 1, at + tile * tile / lanes); ++e) {
      const int i = i0 + e / tile, j = j0 + e % tile;
      if (exists && is_first && i < a_rows && j < b_rows) f(i, j, e == at ? sums.own[0] : sums.own[1]);
    }
  });
}

// sums[i, j] = Σ_m a[m, i] b[m, j] of a tile that begins where a and b do, of which each of four lanes adds some. Without b
// the first column is Σ_m a[m, i], and the others are 0.
template <bool packed>
__device__ __forceinline__ void multiply_transposed(const Rows& a, const Rows& b, int M, Sums& sums) {
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
