// What stands around a product that torch's library computes, and before the first of a backward pass: g, and dz with
// db. Bound by bandwidth.
#pragma once

#include <algorithm>
#include <utility>

#include "pack.cuh"
#include "splits.cuh"

namespace fastmlp::cuda::elementwise {

constexpr int threads = 256;

// y [rows, columns] = g(z), whose rows are ldz apart; y may be z. A thread has a pack of a row.
template <class T>
__global__ void __launch_bounds__(threads)
    activate_all(const T* z, int64_t ldz, T* y, int64_t rows, int64_t columns, const Activation g) {
  constexpr int size = Pack<T>::size;
  wait_for_previous(), let_next_begin();
  const int64_t i = blockIdx.x * int64_t{threads} + threadIdx.x, packs = (columns + size - 1) / size;
  const int64_t row = rows > 1 ? i / packs : 0, column = (i - row * packs) * size, left = columns - column;
  if (row >= rows || left <= 0) return;
  const bool aligned = is_aligned<T>(reinterpret_cast<uintptr_t>(z) | reinterpret_cast<uintptr_t>(y)) &&
                       (rows == 1 || (columns % size == 0 && ldz % size == 0));
  Pack<T> pack = load(z + row * ldz + column, left, aligned);
  if (is_simple(g)) activate<true>(pack, g);
  else activate<false>(pack, g);
  store(y + row * columns + column, pack, left, aligned);
}

// Of matrices [rows, columns]: dz = dy · g', which may be dy; y = g of what is saved; and db [columns]. Each is null where
// it is not wanted. A block has `rows_of_block` rows, a thread a pack of columns, as many threads as `across` are beside
// each other.
template <class T>
__global__ void __launch_bounds__(threads)
    differentiate_all(const T* grad_y, const T* saved, T* dz, T* y, T* grad_bias, const Activation g,
                      int64_t rows, int64_t columns, int across, const Splits splits) {
  constexpr int size = Pack<T>::size;
  alignas(16) __shared__ float shared[threads * size];
  // Of a sum, so that the threads' fours are on different banks.
  const auto place = [&](int i) { return shared + (i ^ i / 32 % 2 * 4); };
  const int wide = across * size, apart = threads / across;
  const unsigned split = blockIdx.x % splits.count, tile = blockIdx.x / splits.count;
  const int64_t column0 = int64_t{tile} * wide, column = column0 + threadIdx.x % across * size;
  const int64_t left = columns - column, row0 = int64_t{split} * splits.steps;
  const int64_t end = row0 + splits.steps < rows ? row0 + splits.steps : rows;
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  const bool aligned =
      is_aligned<T>(address(grad_y) | address(saved) | address(dz) | address(y)) && columns % size == 0;

  wait_for_previous(), let_next_begin();
  float sums[size] = {};
  for (int64_t m = row0 + threadIdx.x / across; m < end && left > 0; m += apart) {
    const int64_t at = m * columns + column;
    Pack<T> pack = load(grad_y + at, left, aligned);
    if (g.kind != Activation::identity) {
      Pack<T> own = load(saved + at, left, aligned);
      if (is_simple(g)) differentiate<true>(pack, own, g, y);
      else differentiate<false>(pack, own, g, y);
      if (dz) store(dz + at, pack, left, aligned);
      if (y) store(y + at, own, left, aligned);
    }
#pragma unroll
    for (int e = 0; e < size; ++e) sums[e] += to_float(pack.elements[e]);
  }
  if (!grad_bias) return;
#pragma unroll
  for (int e = 0; e < size; e += 4)
    store(place(threadIdx.x * size + e), {sums[e], sums[e + 1], sums[e + 2], sums[e + 3]});
  __syncthreads();
  float sum = 0.0f;
  const bool is_column = threadIdx.x < wide && column0 + threadIdx.x < columns;
  for (int row = 0; row < apart && is_column; ++row) sum += *place(row * wide + threadIdx.x);
  if (add_splits<threads, 0>(nullptr, sum, splits, tile, split) && is_column)
    store(grad_bias + column0 + threadIdx.x, sum);
}

// Bytes of the splits' sums.
inline int64_t workspace(Dtype dtype, int64_t rows, int64_t columns) {
  return Splits::bytes(share(dtype, rows, columns).cut, threads);
}

template <class T>
cudaError_t activate(const void* z, int64_t ldz, void* y, int64_t rows, int64_t columns, const Activation& g,
                     cudaStream_t stream) {
  if (ldz == columns) columns *= std::exchange(rows, 1);
  return launch<activate_all<T>>(blocks_of(rows * blocks_of(columns, Pack<T>::size), threads), threads,
                                 stream, static_cast<const T*>(z), ldz, static_cast<T*>(y), rows, columns, g);
}

// dz, y and db, each of them or null for none. Without dz, dy is dz.
template <class T>
cudaError_t differentiate(const Backward& b, void* dz, void* y, void* grad_bias, void* memory,
                          cudaStream_t stream) {
  const Share own = share(b.dtype, b.M, b.N);
  return launch<differentiate_all<T>>(own.cut.tiles * own.cut.splits, threads, stream,
                                      static_cast<const T*>(b.grad_y), static_cast<const T*>(b.saved),
                                      static_cast<T*>(dz), static_cast<T*>(dz ? y : nullptr),
                                      static_cast<T*>(grad_bias), dz ? b.activation : Activation{}, b.M, b.N,
                                      own.across, Splits(own.cut, memory));
}

}  // namespace fastmlp::cuda::elementwise
