// Many tensors in one launch: they are told to the kernel as an argument, which needs no copy and no memory. Each block
// has some elements of one tensor, which it loads and stores by packs.
#pragma once

#include "launch.cuh"

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

inline int64_t blocks_of(int64_t size, int64_t elements_of_block) {
  return (size + elements_of_block - 1) / elements_of_block;
}

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

template <class T>
__device__ __forceinline__ bool is_aligned(uintptr_t addresses) {  // joined by "or"
  return addresses % sizeof(Pack<T>) == 0;
}

// The first n elements at p, whole where n is at least a pack's size and p is aligned.
template <class T>
__device__ __forceinline__ Pack<T> load(const T* p, int64_t n, bool aligned) {
  if (aligned && n >= Pack<T>::size) return *reinterpret_cast<const Pack<T>*>(p);
  Pack<T> pack{};
  for (int j = 0; j < Pack<T>::size; ++j)
    if (j < n) pack.elements[j] = p[j];
  return pack;
}

template <class T>
__device__ __forceinline__ void store(T* p, const Pack<T>& pack, int64_t n, bool aligned) {
  if (aligned && n >= Pack<T>::size) {
    *reinterpret_cast<Pack<T>*>(p) = pack;
    return;
  }
  for (int j = 0; j < Pack<T>::size; ++j)
    if (j < n) p[j] = pack.elements[j];
}

}  // namespace fastmlp::cuda
