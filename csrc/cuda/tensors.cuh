// Many tensors in one launch: they are told to the kernel as an argument, which needs no copy and no memory. Each block
// has some elements of one tensor, which it loads and stores by packs.
#pragma once

#include "pack.cuh"
#include "plan.h"

namespace fastmlp::cuda {

template <class Tensor, int most_>
struct Table {
  static constexpr int most = most_;
  int count;
  Tensor tensors[most];       // none of them empty
  int64_t first_block[most];  // of each tensor

  // Whose blocks a block is among: the last tensor that begins no later.
  __device__ __forceinline__ int tensor_of(int64_t block) const {
    int tensor = 0;
    for (int end = count; end - tensor > 1;) {
      const int middle = (tensor + end) / 2;
      if (first_block[middle] <= block) tensor = middle;
      else end = middle;
    }
    return tensor;
  }
};

// Calls enqueue(table, blocks) for the tensors, as many as a table has room for at a time.
template <class Table, class Tensor, class F>
cudaError_t for_tables(const Tensor* tensors, int64_t count, int64_t elements_of_block, F enqueue) {
  cudaError_t error = cudaSuccess;
  for (const Tensor* const end = tensors + count; tensors != end && error == cudaSuccess;) {
    Table table{};
    int64_t blocks = 0;
    for (; tensors != end && table.count < Table::most; ++tensors) {
      if (tensors->size == 0) continue;
      table.tensors[table.count] = *tensors;
      table.first_block[table.count++] = blocks;
      blocks += blocks_of(tensors->size, elements_of_block);
    }
    error = enqueue(table, blocks);
  }
  return error;
}

}  // namespace fastmlp::cuda
