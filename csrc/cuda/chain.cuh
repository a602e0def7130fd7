// A network of narrow layers as one kernel: a block takes rows of the batch through all layers, and what one layer
// gives the next stays in shared memory. So does dz, from the last layer to the first: the gradients of the weights
// are products over the batch, which cannot be had before it is through, and are left to product.cuh.
//
// After "fully fused" networks: Müller et al., Real-time Neural Radiance Caching for Path Tracing, 2021.
#pragma once

#include "product.cuh"

namespace fastmlp::cuda {

// One product of the chain, C [M, columns] = A B, where A is what the link before gave.
//   forward    B = Wᵀ     C = y, and A of the next is y
//   backward   B = W      C = dz of the layer below, or the network's dx
// The order of sums, and what is rounded, is as in product.cuh, so the bits are those of single layers.
template <class T, bool transposed>
struct Link {
  Operand<T, transposed> weight;  // its rows are the columns of C
  int K;
  Result<T> result;  // c is null where only the next link reads it
};

template <class T, bool transposed>
struct Links {
  int count;
  int slots;  // of shared memory for weights: as many as links, or two or more, which they take in turn
  Link<T, transposed> links[most_links];
};

// A matrix in shared memory is one tile after the other along its columns, each `depth` wide. Between those of the rows is
// half a line of banks, so that a row's packs in two of them are on different ones.
template <class T, bool transposed, class Tiling>
struct Shared {
  using Rows = Layout<T, false, Tiling::m>;
  using Weights = Layout<T, transposed, Tiling::n>;
  static constexpr int tiles = Tiling::n / depth<T>, pitch = Rows::size + depth<T>;
  static constexpr int weight_size = tiles * Weights::size;
  static constexpr int64_t bytes(int slots) {
    return int64_t{sizeof(T)} * (tiles * pitch + slots * weight_size);
  }
};

// Bound by bandwidth, of reading the first A and writing every C that is asked for. A block's tile is Tiling::m rows
// of the batch and all columns; it takes such tiles until there are none.
template <template <class, class, class, class> class Math, class Tiling, int width, class T, bool transposed>
__global__ void __launch_bounds__(Tiling::threads, 1)
    chain(const Operand<T, false> first, const Links<T, transposed> links, int64_t M) {
  using S = Shared<T, transposed, Tiling>;
  using Rows = typename S::Rows;
  using Weights = typename S::Weights;
  T* const rows = reinterpret_cast<T*>(ptx::dynamic_shared_memory());
  T* const weights = rows + S::tiles * S::pitch;
  const auto place = [&](int row, int n) {
    return rows + n / depth<T> * S::pitch + Rows::at(row, n % depth<T>);
  };
  const auto tiles_along = [](int K) { return (K + depth<T> - 1) / depth<T>; };
  const auto weight_of = [&](int use) { return weights + use % links.slots * S::weight_size; };
  const auto start_weight = [&](int use) {
    const Link<T, transposed>& link = links.links[use % links.count];
    Carrier<Operand<T, transposed>, Weights, Tiling::threads, width> carrier(link.weight, 0, 0);
    for (int t = 0; t < tiles_along(link.K); ++t)
      carrier.start(weight_of(use) + t * Weights::size, link.K - t * depth<T>);
  };

  wait_for_previous();
  start_weight(0);
  int use = 0;  // of weights, by the block
  for (int64_t m0 = blockIdx.x * int64_t{Tiling::m}; m0 < M; m0 += gridDim.x * int64_t{Tiling::m}) {
    const int K = links.links[0].K;
    Carrier<Operand<T, false>, Rows, Tiling::threads, width> carrier(first, m0, 0);
    for (int t = 0; t < tiles_along(K); ++t) carrier.start(rows + t * S::pitch, K - t * depth<T>);
    for (int i = 0; i < links.count; ++i, ++use) {
      const Link<T, transposed>& link = links.links[i];
      const bool last = i + 1 == links.count;
      Math<T, Tiling, Rows, Weights> math;
      math.begin([&](int column) { return transposed ? 0.0f : link.result.bias_of(column); });
      ptx::commit_copies();
      ptx::wait_for_copies<0>();
      __syncthreads();  // A and B are there, and the slot of the B before is free
      const bool more = !last || m0 + gridDim.x * int64_t{Tiling::m} < M;
      if (!more) let_next_begin();
      if (links.slots == links.count ? use + 1 < links.count : more) start_weight(use + 1);

      for (int t = 0; t < tiles_along(link.K); ++t)
        math.multiply(rows + t * S::pitch, weight_of(use) + t * Weights::size);
      __syncthreads();  // A has been read, and C takes its place
      math.each([&](int row, int column, const auto& sums) { store(place(row, column), sums); });
      finish_tile<Tiling, transposed ? Pass::dx : Pass::forward>(
          link.result, m0, 0, place, [&](Pack<T>& pack, Pack<T>* own, int column) {
            if (last) return;
#pragma unroll
            for (int e = 0; e < Pack<T>::size; ++e)  // beyond the columns, where A may have made NaN of 0
              if (column + e >= link.result.columns) store(&pack.elements[e], 0.0f);
            *own = pack;
          });
      if (last) __syncthreads();  // before the next rows take the place of these
    }
  }
}

}  // namespace fastmlp::cuda
