// The product of two tiles on tensor cores: bfloat16 and float16 as they are, float32 as tf32, whose mantissa has 10
// bits. Sums are in float32.
#pragma once

#include "product.cuh"

namespace fastmlp::cuda {

template <class T, class Tiling, class A, class B>
struct TensorCore {
  // The instruction takes tiles of 16 x 8, and as much of the sum as two packs of 16 bytes.
  static constexpr int down = Tiling::warp_m / 16, across = Tiling::warp_n / 8, half = Pack<T>::size;
  static constexpr int blocks =
      Tiling::m == 128 ? 2 : 3;         // of a multiprocessor, for which registers are left
  static constexpr int rows_apart = 1;  // of the lanes' sums
  float sums[down * across][4];

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int row0() {
    return threadIdx.x / 32 / Tiling::warps_across * Tiling::warp_m;
  }
  static __device__ __forceinline__ int column0() {
    return threadIdx.x / 32 % Tiling::warps_across * Tiling::warp_n;
  }

  // The elements of 16 rows and two packs along the sum that the instruction wants from this lane. They come in four
  // matrices of 8 rows and a pack, numbered down the rows first as A has them, or along the sum first as B.
  template <class Layout, bool rows_first>
  static __device__ __forceinline__ void load(uint32_t (&registers)[4], const T* tile, int row, int k) {
    const auto lower_row = [&](int matrix) { return row + (rows_first ? matrix % 2 : matrix / 2) * 8; };
    const auto lower_k = [&](int matrix) { return k + (rows_first ? matrix / 2 : matrix % 2) * half; };
    if constexpr (Layout::transposed && sizeof(T) == 4) {
#pragma unroll
      for (int matrix = 0; matrix < 4; ++matrix)
        registers[matrix] = bit_cast<uint32_t>(
            tile[Layout::at(lower_k(matrix) + lane() % 4, lower_row(matrix) + lane() / 4)]);
    } else {
      const int own = lane() % 8, at_row = lower_row(lane() / 8), at_k = lower_k(lane() / 8);
      ptx::load_matrices<Layout::transposed>(
          registers,
          tile + (Layout::transposed ? Layout::at(at_k + own, at_row) : Layout::at(at_row + own, at_k)));
    }
    if constexpr (sizeof(T) == 4)
      for (uint32_t& bits : registers) bits = ptx::round_to_tf32(bits);
  }

  // The sums begin with f(column).
  template <class F>
  __device__ __forceinline__ void begin(F f) {
#pragma unroll
    for (int j = 0; j < across; ++j) {
      const int column = column0() + j * 8 + lane() % 4 * 2;
      const float first = f(column), second = f(column + 1);
#pragma unroll
      for (int i = 0; i < down; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i * across + j][e] = e % 2 ? second : first;
    }
  }

  __device__ __forceinline__ void multiply(const T* a, const T* b) {
#pragma unroll
    for (int k = 0; k < depth<T>; k += 2 * half) {
      uint32_t left[down][4], right[across][2];
#pragma unroll
      for (int i = 0; i < down; ++i) load<A, true>(left[i], a, row0() + i * 16, k);
#pragma unroll
      for (int j = 0; j < across; j += 2) {
        uint32_t two[4];
        load<B, false>(two, b, column0() + j * 8, k);
        right[j][0] = two[0], right[j][1] = two[1];
        right[j + 1][0] = two[2], right[j + 1][1] = two[3];
      }
#pragma unroll
      for (int i = 0; i < down; ++i)
#pragma unroll
        for (int j = 0; j < across; ++j) ptx::multiply_matrices<T>(sums[i * across + j], left[i], right[j]);
    }
  }

  // Calls f(row, column, sums of that column and the next) for what the thread has of the tile.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll
    for (int i = 0; i < down; ++i)
#pragma unroll
      for (int j = 0; j < across; ++j) {
        const int row = row0() + i * 16 + lane() / 4, column = column0() + j * 8 + lane() % 4 * 2;
        const float (&own)[4] = sums[i * across + j];
        const float upper[] = {own[0], own[1]}, lower[] = {own[2], own[3]};
        f(row, column, upper);
        f(row + 8, column, lower);
      }
  }
};

}  // namespace fastmlp::cuda
