// A network of narrow layers as one kernel: a block takes rows of the batch through all layers, and what one layer
// gives the next stays in shared memory. So does dz, from the last layer to the first: the gradients of the weights
// are products over the batch, which cannot be had before it is through, and are left to product.cuh.
//
// After "fully fused" networks: Müller et al., Real-time Neural Radiance Caching for Path Tracing, 2021.
#pragma once

#include "product.cuh"

namespace fastmlp::cuda {

constexpr int most_links = 16;

// One product of the chain, C [M, columns] = A B, where A is what the link before gave.
//   forward    B = Wᵀ     C = y, and A of the next is y
//   backward   B = W      C = dx, and A of the next is dx · g', from what the layer below has saved [M, columns]
// The order of sums, and what is rounded, is as in product.cuh, so the bits are those of single layers.
template <class T, bool transposed>
struct Link {
  Plain<T, transposed> weight;  // its rows are the columns of C
  int64_t K;
  Result<T> result;  // c is null where only the next link reads it
  const T* saved;    // null in the forward pass, and in the last link
  Activation activation_of_saved;
};

template <class T, bool transposed>
struct Links {
  int count;
  int slots;  // of shared memory for weights: as many as links, or two or more, which they take in turn
  Link<T, transposed> links[most_links];
};

// A matrix in shared memory is one tile after the other along its columns, each `depth` wide.
template <class T, bool transposed, class Tiling>
struct Shared {
  using Rows = Layout<T, false, Tiling::m>;
  using Weights = Layout<T, transposed, Tiling::n>;
  static constexpr int tiles = Tiling::n / depth<T>;
  static constexpr int weight_size = tiles * Weights::size;
  static constexpr int64_t bytes(int slots) {
    return int64_t{sizeof(T)} * (tiles * Rows::size + slots * weight_size);
  }
};

// Bound by bandwidth, of reading the first A and writing every C that is asked for. A block's tile is Tiling::m rows
// of the batch and all columns; it takes such tiles until there are none.
template <template <class, class, class, class> class Math, class Tiling, class First, bool transposed>
__global__ void __launch_bounds__(Tiling::threads)
    chain(const First first, const Links<typename First::T, transposed> links, int64_t M) {
  using T = typename First::T;
  using S = Shared<T, transposed, Tiling>;
  using Rows = typename S::Rows;
  using Weights = typename S::Weights;
  T* const rows = reinterpret_cast<T*>(ptx::dynamic_shared_memory());
  T* const weights = rows + S::tiles * Rows::size;
  const auto place = [](int row, int n) {
    return n / depth<T> * Rows::size + row * Rows::pitch + n % depth<T>;
  };
  const auto tiles_along = [](int64_t K) { return static_cast<int>((K + depth<T> - 1) / depth<T>); };
  const auto weight_of = [&](int use) { return weights + use % links.slots * S::weight_size; };
  const auto start_weight = [&](int use) {
    const Link<T, transposed>& link = links.links[use % links.count];
    Carrier<Plain<T, transposed>, Weights, Tiling::threads> carrier;
    for (int t = 0; t < tiles_along(link.K); ++t)
      carrier.start(weight_of(use) + t * Weights::size, link.weight,
                    Window(link.weight, 0, t * depth<T>, link.K));
  };

  start_weight(0);
  int use = 0;  // of weights, by the block
  for (int64_t m0 = blockIdx.x * int64_t{Tiling::m}; m0 < M; m0 += gridDim.x * int64_t{Tiling::m}) {
    Carrier<First, Rows, Tiling::threads> carrier;
    for (int t = 0; t < tiles_along(links.links[0].K); ++t) {
      carrier.start(rows + t * Rows::size, first, Window(first, m0, t * depth<T>, links.links[0].K));
      carrier.finish(rows + t * Rows::size);
    }
    for (int i = 0; i < links.count; ++i, ++use) {
      const Link<T, transposed>& link = links.links[i];
      const bool last = i + 1 == links.count;
      ptx::commit_copies();
      ptx::wait_for_copies<0>();
      __syncthreads();  // A and B are there, and the slot of the B before is free
      const bool more = !last || m0 + gridDim.x * int64_t{Tiling::m} < M;
      if (links.slots == links.count ? use + 1 < links.count : more) start_weight(use + 1);

      Math<T, Tiling, Rows, Weights> math;
      for (int t = 0; t < tiles_along(link.K); ++t)
        math.multiply(rows + t * Rows::size, weight_of(use) + t * Weights::size);
      // An activation that is not simple comes when all of z, or dx, is in shared memory.
      const Activation& activation = transposed ? link.activation_of_saved : link.result.activation;
      const auto in_two_steps = [&] { return !is_simple(activation); };  // not kept: registers are few here
      __syncthreads();  // A has been read, and C takes its place
      math.each_pair([&](int row, int column, float one, float two) {
        const int64_t m = m0 + row, columns = link.result.columns;
        const float sums[] = {one, two};
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int n = column + e;
          const int64_t at = m * columns + n;
          T rounded{};
          if (m < M && n < columns) {
            store(&rounded, !transposed && in_two_steps() ? link.result.z_of(sums[e], n)
                                                          : link.result.y_of(sums[e], n));
            if (link.result.c && (transposed || !in_two_steps())) link.result.c[at] = rounded;
            if (link.saved && activation.kind == Activation::relu)
              store(&rounded, Relu{}.gradient(to_float(rounded), to_float(link.saved[at])));
          }
          if (!last || in_two_steps()) rows[place(row, n)] = rounded;
        }
      });
      if (!in_two_steps()) continue;
      __syncthreads();
#pragma unroll 1
      for (int e = 0; e < Tiling::m * Tiling::n / Tiling::threads; ++e) {  // in pairs, which share no word
        const int at_pair = (e / 2 * Tiling::threads + threadIdx.x) * 2, row = at_pair / Tiling::n;
        const int n = at_pair % Tiling::n + e % 2;
        const int64_t m = m0 + row, columns = link.result.columns, at = m * columns + n;
        if (m >= M || n >= columns) continue;
        T& own = rows[place(row, n)];
        if constexpr (transposed)
          store(&own, differentiated(activation, to_float(own), to_float(link.saved[at])));
        else own = link.result.write(own, at);
      }
      if (last) __syncthreads();  // before the next rows take the place of these
    }
  }
}

}  // namespace fastmlp::cuda
