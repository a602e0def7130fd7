// What stands around a product that torch's library computes: g after it, and before it dz, with db. Bound by bandwidth.
#pragma once

#include <algorithm>

#include "../activation.h"
#include "product.cuh"
#include "tensors.cuh"

namespace fastmlp::cuda::elementwise {

constexpr int threads = 256;

// g of each element, and dy · g' of the same in `saved`: the simple in unrolled code. The others are long: they are there
// once, for the first element, and all move up by one place in turn.
template <class T>
__device__ __forceinline__ void activate(Pack<T>& z, const Activation& g) {
  if (g.kind == Activation::relu) {
#pragma unroll
    for (T& element : z.elements) store(&element, Relu{}(to_float(element)));
    return;
  }
#pragma unroll 1
  for (int e = 0; e < Pack<T>::size; ++e) {
    T y;
    store(&y, activated(g, to_float(z.elements[0])));
    rotate(z.elements, y);
  }
}
template <class T>
__device__ __forceinline__ void differentiate(Pack<T>& dy, const Pack<T>& saved_, const Activation& g,
                                              float (&sums)[Pack<T>::size]) {  // dz is added to them
  if (is_simple(g)) {
#pragma unroll
    for (int e = 0; e < Pack<T>::size; ++e) {
      if (g.kind == Activation::relu)
        store(&dy.elements[e], Relu{}.gradient(to_float(dy.elements[e]), to_float(saved_.elements[e])));
      sums[e] += to_float(dy.elements[e]);
    }
    return;
  }
  Pack<T> saved = saved_;
#pragma unroll 1
  for (int e = 0; e < Pack<T>::size; ++e) {
    const float dz = differentiated(g, to_float(dy.elements[0]), to_float(saved.elements[0]));
    T rounded;
    store(&rounded, dz);
    rotate(dy.elements, rounded);
    rotate(saved.elements, rounded);
    rotate(sums, sums[0] + dz);
  }
}

// y = g(z), of `size` elements; y may be z.
template <class T>
__global__ void __launch_bounds__(threads) activate_all(const T* z, T* y, int64_t size, const Activation g) {
  const int64_t i = (blockIdx.x * int64_t{threads} + threadIdx.x) * Pack<T>::size, left = size - i;
  if (left <= 0) return;
  const bool aligned = is_aligned<T>(reinterpret_cast<uintptr_t>(z) | reinterpret_cast<uintptr_t>(y));
  Pack<T> pack = load(z + i, left, aligned);
  activate(pack, g);
  store(y + i, pack, left, aligned);
}

// dz = dy · g' [rows, columns], where it is not null, which may be dy; and the sums of its columns, of each
// `rows_of_block` rows for themselves, where they are wanted. A thread has a pack of columns, as many threads as `across`
// are beside each other.
template <class T, class Sum>
__global__ void __launch_bounds__(threads)
    differentiate_all(const T* grad_y, const T* saved, T* dz, const Activation g, int64_t rows,
                      int64_t columns, int64_t rows_of_block, int across, Sum* sums) {
  constexpr int size = Pack<T>::size;
  __shared__ float shared[threads * size];
  const int wide = across * size, step = threads / across;
  const int64_t tiles = (columns + wide - 1) / wide;
  const int64_t split = blockIdx.x / tiles, column0 = blockIdx.x % tiles * wide;
  const int64_t column = column0 + threadIdx.x % across * size, left = columns - column;
  const int64_t row0 = split * rows_of_block, end = row0 + rows_of_block < rows ? row0 + rows_of_block : rows;
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  const bool aligned = is_aligned<T>(address(grad_y) | address(saved) | address(dz)) && columns % size == 0;

  float sum[size] = {};
  for (int64_t m = row0 + threadIdx.x / across; m < end && left > 0; m += step) {
    const int64_t at = m * columns + column;
    Pack<T> pack = load(grad_y + at, left, aligned), y{};
    if (g.kind != Activation::identity) y = load(saved + at, left, aligned);
    differentiate(pack, y, g, sum);
    if (dz) store(dz + at, pack, left, aligned);
  }
  if (!sums) return;
#pragma unroll
  for (int e = 0; e < size; ++e) shared[threadIdx.x * size + e] = sum[e];
  __syncthreads();
  if (threadIdx.x >= wide || column0 + threadIdx.x >= columns) return;
  float total = 0.0f;
  for (int row = 0; row < step; ++row) total += shared[row * wide + threadIdx.x];
  store(sums + split * columns + column0 + threadIdx.x, total);
}

// How a matrix is shared out among blocks.
struct Share {
  int across;
  int64_t tiles, splits;
};
template <class T>
Share share(int64_t rows, int64_t columns, int64_t blocks) {
  const int64_t packs = blocks_of(columns, Pack<T>::size);
  int across = 1;
  while (across < 32 && across < packs) across *= 2;
  const int64_t tiles = blocks_of(packs, across), least = 4 * threads / across;  // four rows a thread
  return {across, tiles,
          std::clamp<int64_t>(blocks / std::max<int64_t>(tiles, 1), 1, blocks_of(rows + 1, least))};
}

// Bytes of the splits' sums.
template <class T>
int64_t workspace(int64_t rows, int64_t columns, int64_t blocks) {
  return share<T>(rows, columns, blocks).splits * columns * int64_t{sizeof(float)};
}

template <class T>
cudaError_t activate(const void* z, void* y, int64_t size, const Activation& g, cudaStream_t stream) {
  return launch(activate_all<T>, blocks_of(size, threads * Pack<T>::size), threads, stream,
                static_cast<const T*>(z), static_cast<T*>(y), size, g);
}

// dz, or null for none, and db, or null.
template <class T>
cudaError_t differentiate(const Backward& b, void* dz, float* sums, int64_t blocks, cudaStream_t stream) {
  const Share cut = share<T>(b.M, b.N, blocks);
  const int64_t rows_of_block = blocks_of(b.M, cut.splits);
  const auto enqueue = [&](auto* target) {
    return launch(differentiate_all<T, std::remove_pointer_t<decltype(target)>>, cut.tiles * cut.splits,
                  threads, stream, static_cast<const T*>(b.grad_y), static_cast<const T*>(b.saved),
                  static_cast<T*>(dz), b.activation, b.M, b.N, rows_of_block, cut.across, target);
  };
  T* const grad_bias = static_cast<T*>(b.grad_bias);
  if (!grad_bias || cut.splits == 1) return dz || grad_bias ? enqueue(grad_bias) : cudaSuccess;
  const cudaError_t error = enqueue(sums);
  if (error != cudaSuccess) return error;
  const Share second = share<float>(cut.splits, b.N, 1);
  return launch(differentiate_all<float, T>, second.tiles, threads, stream, static_cast<const float*>(sums),
                static_cast<const float*>(nullptr), static_cast<float*>(nullptr), Activation{}, cut.splits,
                b.N, cut.splits, second.across, grad_bias);
}

}  // namespace fastmlp::cuda::elementwise
