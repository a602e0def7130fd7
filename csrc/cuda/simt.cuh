// The product of two tiles by multiply-adds, for float32 that is IEEE's.
#pragma once

#include "product.cuh"

namespace fastmlp::cuda {

// The lanes of a warp are 8 down and 4 across; each has a patch of rows and columns, which it loads 16 bytes at a time:
// 16 loads to 256 multiply-adds of the large tile.
template <class T, class Tiling, class A, class B>
struct Simt {
  static constexpr int down = Tiling::warp_m / 8, across = Tiling::warp_n / 4;
  static constexpr int pack = Pack<float>::size;
  static_assert(down % pack == 0 && across % pack == 0);
  static constexpr int blocks =
      Tiling::m == 128 ? 1 : 3;  // of a multiprocessor, for which registers are left
  static constexpr int rows_apart = A::transposed ? pack : 1;  // of the lanes' sums
  float sums[down * across / 4][4];
  __device__ __forceinline__ float& sum(int i, int j) { return sums[(i * across + j) / 4][j % 4]; }

  // The patch's rows and columns: where operands are transposed, neighbours to be loaded at once; else spread, so that
  // the lanes' lines are on different banks. Columns come in pairs either way.
  static __device__ __forceinline__ int row(int i) {
    const int lane = threadIdx.x % 8, row0 = threadIdx.x / 32 / Tiling::warps_across * Tiling::warp_m;
    return row0 + (A::transposed ? i / pack * 8 * pack + lane * pack + i % pack : i * 8 + lane);
  }
  static __device__ __forceinline__ int column(int j) {
    const int lane = threadIdx.x / 8 % 4, column0 = threadIdx.x / 32 % Tiling::warps_across * Tiling::warp_n;
    return column0 +
           (B::transposed ? j / pack * 4 * pack + lane * pack + j % pack : j / 2 * 8 + lane * 2 + j % 2);
  }

  static __device__ __forceinline__ Pack<float> load(const float* p) {
    return *reinterpret_cast<const Pack<float>*>(p);
  }

  // The sums begin with f(column).
  template <class F>
  __device__ __forceinline__ void begin(F f) {
#pragma unroll
    for (int j = 0; j < across; ++j) {
      const float first = f(column(j));
#pragma unroll
      for (int i = 0; i < down; ++i) sum(i, j) = first;
    }
  }

  __device__ __forceinline__ void multiply(const float* a, const float* b) {
#pragma unroll
    for (int k0 = 0; k0 < depth<float>; k0 += pack) {
      float left[down][pack];
#pragma unroll
      for (int i = 0; i < down; i += A::transposed ? pack : 1)
#pragma unroll
        for (int k = 0; k < (A::transposed ? pack : 1); ++k) {
          const Pack<float> own = load(a + (A::transposed ? A::at(k0 + k, row(i)) : A::at(row(i), k0)));
#pragma unroll
          for (int e = 0; e < pack; ++e) (A::transposed ? left[i + e][k] : left[i][e]) = own.elements[e];
        }
      if constexpr (B::transposed) {
#pragma unroll
        for (int k = 0; k < pack; ++k)
#pragma unroll
          for (int j = 0; j < across; j += pack) {
            const Pack<float> right = load(b + B::at(k0 + k, column(j)));
#pragma unroll
            for (int i = 0; i < down; ++i)
#pragma unroll
              for (int e = 0; e < pack; ++e) sum(i, j + e) += left[i][k] * right.elements[e];
          }
      } else {
#pragma unroll
        for (int j = 0; j < across; ++j) {
          const Pack<float> right = load(b + B::at(column(j), k0));
#pragma unroll
          for (int k = 0; k < pack; ++k)
#pragma unroll
            for (int i = 0; i < down; ++i) sum(i, j) += left[i][k] * right.elements[k];
        }
      }
    }
  }

  // Calls f(row, column, sums of that column and its neighbours) for what the thread has of the tile.
  template <class F>
  __device__ __forceinline__ void each(F f) {
    constexpr int neighbours = B::transposed ? pack : 2;
#pragma unroll
    for (int i = 0; i < down; ++i)
#pragma unroll
      for (int j = 0; j < across; j += neighbours) {
        float own[neighbours];
#pragma unroll
        for (int e = 0; e < neighbours; ++e) own[e] = sum(i, j + e);
        f(row(i), column(j), own);
      }
  }
};

}  // namespace fastmlp::cuda
