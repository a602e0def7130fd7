// One step of an optimizer for many tensors in one launch. Bound by bandwidth, and where tensors are small by
// the launch itself: so the tensors are told to the kernel as an argument, which needs no copy and no memory.
#pragma once

#include "../optimizer.h"
#include "launch.cuh"

namespace fastmlp::cuda::update {

constexpr int threads = 256;
constexpr int packs = 2;               // of a thread's, one after the other
constexpr int tensors_of_launch = 60;  // arguments end at 4096 bytes

template <class T>
constexpr int64_t elements_of_block = int64_t{threads} * packs * Pack<T>::size;

struct Table {
  int count;
  Update tensors[tensors_of_launch];       // none of them empty
  int64_t first_block[tensors_of_launch];  // of each tensor
};

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

template <class T, class Row>
__global__ void __launch_bounds__(threads) step(const Table table, const Optimizer o) {
  int tensor = 0;  // whose blocks this one is among: the last that begins no later
  for (int end = table.count; end - tensor > 1;) {
    const int middle = (tensor + end) / 2;
    if (table.first_block[middle] <= blockIdx.x) tensor = middle;
    else end = middle;
  }
  const Update u = table.tensors[tensor];
  T* const param = static_cast<T*>(u.param);
  const T* const grad = static_cast<const T*>(u.grad);
  const Row row(o, u.rates);
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  uintptr_t addresses = address(param) | address(grad);
  for (int k = 0; k < Row::states; ++k) addresses |= address(u.states[k]);
  const bool aligned = addresses % sizeof(Pack<T>) == 0;

  int64_t i = (blockIdx.x - table.first_block[tensor]) * elements_of_block<T> + threadIdx.x * Pack<T>::size;
  for (int p = 0; p < packs && i < u.size; ++p, i += threads * Pack<T>::size) {
    const int64_t n = u.size - i;
    const Pack<T> g = load(grad + i, n, aligned);
    Pack<T> w = load(param + i, n, aligned), states[most_states]{};
    for (int k = 0; k < Row::states && !row.first; ++k)
      states[k] = load(static_cast<const T*>(u.states[k]) + i, n, aligned);
    for (int j = 0; j < Pack<T>::size; ++j) {
      float state[most_states];
      for (int k = 0; k < Row::states; ++k) state[k] = to_float(states[k].elements[j]);
      cuda::store(&w.elements[j], row(to_float(w.elements[j]), to_float(g.elements[j]), state));
      for (int k = 0; k < Row::states; ++k) cuda::store(&states[k].elements[j], state[k]);
    }
    for (int k = 0; k < Row::states; ++k) store(static_cast<T*>(u.states[k]) + i, states[k], n, aligned);
    store(param + i, w, n, aligned);
  }
}

// One launch for every 60 tensors.
template <class T>
cudaError_t run(const Optimizer& o, const Update* updates, int64_t count, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (const Update* const end = updates + count; updates != end && error == cudaSuccess;) {
    Table table{};
    int64_t blocks = 0;
    for (; updates != end && table.count < tensors_of_launch; ++updates) {
      if (updates->size == 0) continue;
      table.tensors[table.count] = *updates;
      table.first_block[table.count++] = blocks;
      blocks += (updates->size + elements_of_block<T> - 1) / elements_of_block<T>;
    }
    error = with_rule(o, [&](auto named) {
      return launch(step<T, typename decltype(named)::type>, blocks, threads, stream, table, o);
    });
  }
  return error;
}

}  // namespace fastmlp::cuda::update
