// The kernels that are right for every shape, stride and dtype: the products, and the pass that forms dz, db.
//
// All sums are in float32 and in an order that the shape alone decides, so the same input gives the same
// bits. Blocks are numbered along x only, whose limit of 2^31 - 1 no tensor that fits in memory reaches; y
// and z end at 65535.
#pragma once

#include "../activation.h"
#include "launch.cuh"

namespace fastmlp::cuda::tiled {

constexpr int threads = 256;

// ---- C[m][n] = g(Σ_k A(m, k) B(n, k) + bias[n])
//
// Both operands are seen as rows along the sum. So the three products of a layer take them as they lie:
//   y  = x Wᵀ     A = x,   B = W
//   dx = dz W     A = dz,  B = Wᵀ
//   dW = dzᵀ x    A = dzᵀ, B = xᵀ

constexpr int tile = 64;   // a block's outputs: tile x tile
constexpr int depth = 16;  // steps of the sum between two barriers
constexpr int patch = 4;   // a thread's outputs: patch x patch
constexpr int patches = tile / patch;
constexpr int carried = tile * depth / threads;  // elements that a thread brings to each operand's tile
static_assert(patches * patches == threads);

// Four floats in a row stay aligned, and a warp's stores along k meet in pairs on a bank, not in eights.
constexpr int padded = tile + 4;

template <class T, bool transposed>
struct Operand {
  const T* data;
  int64_t stride;  // between rows of the memory, in elements
  int64_t rows;    // the range of m or n

  __device__ float at(int64_t row, int64_t k) const {
    return to_float(transposed ? data[k * stride + row] : data[row * stride + k]);
  }
};

// Where in the tile the thread's element e goes: neighbouring threads read neighbouring addresses.
template <bool transposed>
struct Place {
  int row, k;
  __device__ explicit Place(int e) {
    const int index = threadIdx.x + e * threads;
    row = transposed ? index % tile : index / depth;
    k = transposed ? index / tile : index % depth;
  }
};

// The thread's share of the tile at (row0, k0), with 0 for what lies outside the operand.
template <class T, bool transposed>
__device__ __forceinline__ void fetch(float (&share)[carried], const Operand<T, transposed>& operand,
                                      int64_t row0, int64_t k0, int64_t K) {
  for (int e = 0; e < carried; ++e) {
    const Place<transposed> place(e);
    const int64_t row = row0 + place.row, k = k0 + place.k;
    share[e] = row < operand.rows && k < K ? operand.at(row, k) : 0.0f;
  }
}

template <bool transposed>
__device__ __forceinline__ void deposit(float (&shared)[depth][padded], const float (&share)[carried]) {
  for (int e = 0; e < carried; ++e) {
    const Place<transposed> place(e);
    shared[place.k][place.row] = share[e];
  }
}

// Large shapes are bound by shared memory, which feeds 8 floats to every 16 multiply-adds; small ones by the
// latency of one tile after another, so the next tile is on its way while this one is multiplied.
template <Activation g, class T, bool a_transposed, bool b_transposed>
__global__ void __launch_bounds__(threads)
    product(const Operand<T, a_transposed> a, const Operand<T, b_transposed> b, const T* bias, T* c,
            int64_t K) {
  alignas(16) __shared__ float a_shared[depth][padded];
  alignas(16) __shared__ float b_shared[depth][padded];
  const int64_t tiles_across = (b.rows + tile - 1) / tile;
  const int64_t m0 = blockIdx.x / tiles_across * tile;
  const int64_t n0 = blockIdx.x % tiles_across * tile;
  const int m_patch = threadIdx.x / patches * patch;
  const int n_patch = threadIdx.x % patches * patch;

  float sums[patch][patch] = {};
  float a_share[carried], b_share[carried];
  fetch(a_share, a, m0, 0, K);
  fetch(b_share, b, n0, 0, K);
  for (int64_t k0 = 0; k0 < K; k0 += depth) {
    deposit<a_transposed>(a_shared, a_share);
    deposit<b_transposed>(b_shared, b_share);
    __syncthreads();
    fetch(a_share, a, m0, k0 + depth, K);
    fetch(b_share, b, n0, k0 + depth, K);
    for (int k = 0; k < depth; ++k)
      for (int i = 0; i < patch; ++i)
        for (int j = 0; j < patch; ++j) sums[i][j] += a_shared[k][m_patch + i] * b_shared[k][n_patch + j];
    __syncthreads();
  }

  for (int j = 0; j < patch; ++j) {
    const int64_t n = n0 + n_patch + j;
    if (n >= b.rows) break;
    const float offset = bias ? to_float(bias[n]) : 0.0f;
    for (int i = 0; i < patch; ++i) {
      const int64_t m = m0 + m_patch + i;
      if (m < a.rows) store(&c[m * b.rows + n], activate<g>(sums[i][j] + offset));
    }
  }
}

template <Activation g, class T, bool a_transposed, bool b_transposed>
cudaError_t multiply(const Operand<T, a_transposed>& a, const Operand<T, b_transposed>& b, const T* bias,
                     T* c, int64_t K, cudaStream_t stream) {
  const int64_t blocks = ((a.rows + tile - 1) / tile) * ((b.rows + tile - 1) / tile);
  return launch(product<g, T, a_transposed, b_transposed>, blocks, threads, stream, a, b, bias, c, K);
}

// ---- dz = dy · g'(y), and db = Σ_m dz
//
// Bound by bandwidth: dy and y are read once, dz written once. A block takes 32 columns, a warp every eighth
// row of them, and the eight sums of a column are added in order. Sums of many rows are formed in two passes:
// each chunk of rows, then the chunks, by the same kernel. So no sum is longer than rows / 2048 + 48 terms.

constexpr int columns_of_block = 32;
constexpr int warps = threads / columns_of_block;
constexpr int64_t rows_of_chunk = 256;

constexpr int64_t chunks(int64_t rows) {
  return rows <= rows_of_chunk ? 1 : (rows + rows_of_chunk - 1) / rows_of_chunk;
}

// Writes dz [rows, columns] unless null, as it is for the identity, whose dz is dy. The column sums of each
// chunk go to `partials` [chunks, columns] or, where there is one chunk, to `total` [columns].
template <Activation g, class In, class Out>
__global__ void __launch_bounds__(threads)
    differentiate(const In* __restrict__ grad_y, const In* __restrict__ y, In* __restrict__ dz,
                  float* __restrict__ partials, Out* __restrict__ total, int64_t rows, int64_t columns,
                  int64_t rows_per_chunk) {
  __shared__ float warp_sums[warps][columns_of_block];
  const int64_t blocks_across = (columns + columns_of_block - 1) / columns_of_block;
  const int warp = threadIdx.x / columns_of_block;
  const int column_of_block = threadIdx.x % columns_of_block;
  const int64_t column = blockIdx.x % blocks_across * columns_of_block + column_of_block;
  const int64_t chunk = blockIdx.x / blocks_across;
  const int64_t begin = chunk * rows_per_chunk;
  const int64_t end = begin + rows_per_chunk < rows ? begin + rows_per_chunk : rows;

  float sum = 0.0f;
  if (column < columns) {
    for (int64_t row = begin + warp; row < end; row += warps) {
      const int64_t index = row * columns + column;
      float gradient = to_float(grad_y[index]);
      if constexpr (g != Activation::identity) {
        gradient = activate_backward<g>(gradient, to_float(y[index]));
        if (dz) store(&dz[index], gradient);
      }
      sum += gradient;
    }
  }
  warp_sums[warp][column_of_block] = sum;
  __syncthreads();
  if (warp > 0 || column >= columns) return;
  for (int other = 1; other < warps; ++other) sum += warp_sums[other][column_of_block];
  if (total) store(&total[column], sum);
  if (partials) partials[chunk * columns + column] = sum;
}

// dz and grad_bias may be null. `partials` holds chunks(M) x N floats, unused where there is one chunk.
template <Activation g, class T>
cudaError_t differentiate_and_sum(const T* grad_y, const T* y, T* dz, float* partials, T* grad_bias,
                                  int64_t M, int64_t N, cudaStream_t stream) {
  const int64_t blocks_across = (N + columns_of_block - 1) / columns_of_block;
  const int64_t count = chunks(M);
  const bool two_passes = count > 1 && grad_bias;
  const cudaError_t error =
      launch(differentiate<g, T, T>, count * blocks_across, threads, stream, grad_y, y, dz,
             two_passes ? partials : nullptr, two_passes ? nullptr : grad_bias, M, N, rows_of_chunk);
  if (error != cudaSuccess || !two_passes) return error;
  return launch(differentiate<Activation::identity, float, T>, blocks_across, threads, stream, partials,
                nullptr, nullptr, nullptr, grad_bias, count, N, count);
}

}  // namespace fastmlp::cuda::tiled
