// The choice of kernels for the products of a GPU, from their shapes alone. No CUDA: a build without it tells the plan too.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../kernels.h"

namespace fastmlp::cuda {

// Of a large GPU. The number is fixed, so that no sum is split in another way on another GPU.
#ifndef FASTMLP_MULTIPROCESSORS
#define FASTMLP_MULTIPROCESSORS 128
#endif
inline constexpr int64_t multiprocessors = FASTMLP_MULTIPROCESSORS;

inline int64_t blocks_of(int64_t size, int64_t of_block) { return (size + of_block - 1) / of_block; }

inline constexpr int bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Steps of a product's sum, of 64 bytes of each operand.
inline int64_t steps_of(Dtype dtype, int64_t K) { return blocks_of(K * bytes_of(dtype), 64); }

// How a product is cut: C into tiles of size x size, and each tile's sum into splits of so many steps or fewer.
struct Cut {
  int size;
  int64_t tiles, splits, steps;
};

// The cut whose most loaded multiprocessor is through first. It has the tiles that fall to it, one after the other. A
// tile of 64 x 64 takes a third of the time of one of 128 x 128, which has four times its elements: twice as much goes
// through shared memory for each. Splits are as many as the multiprocessors need, and not shorter than 8 or 16 steps.
inline Cut cut(Dtype dtype, int64_t rows, int64_t columns, int64_t K) {
  const int64_t all = std::max<int64_t>(steps_of(dtype, K), 1);
  const auto with_tiles_of = [&](int size) {
    const int64_t tiles = blocks_of(rows, size) * std::max<int64_t>(blocks_of(columns, size), 1);
    const int64_t most = std::max<int64_t>(all / (size / 8), 1);
    const int64_t splits = std::clamp<int64_t>(multiprocessors / std::max<int64_t>(tiles, 1), 1, most);
    const int64_t steps = blocks_of(all, splits);
    return Cut{size, tiles, blocks_of(all, steps), steps};
  };
  const auto time = [](const Cut& c) {
    return blocks_of(c.tiles * c.splits, multiprocessors) * c.steps * (c.size == 128 ? 3 : 1);
  };
  const Cut large = with_tiles_of(128), small = with_tiles_of(64);
  return time(large) < time(small) ? large : small;
}

// The same splits of tiles of 64 x 64, for operands that the large ones can not bring.
inline Cut in_small_tiles(Cut c, int64_t rows, int64_t columns) {
  c.size = 64, c.tiles = blocks_of(rows, 64) * std::max<int64_t>(blocks_of(columns, 64), 1);
  return c;
}

inline constexpr int most_links = 16;  // of a chain

}  // namespace fastmlp::cuda
