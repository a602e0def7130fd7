// One step of an optimizer for many tensors in one launch. Bound by bandwidth, and where tensors are small by
// the launch itself.
#pragma once

#include "../optimizer.h"
#include "tensors.cuh"

namespace fastmlp::cuda::update {

constexpr int threads = 256;
constexpr int packs = 2;            // of a thread's, one after the other
using Updates = Table<Update, 60>;  // arguments end at 4096 bytes

template <class T>
constexpr int64_t elements_of_block = int64_t{threads} * packs * Pack<T>::size;

template <class T>
__device__ __forceinline__ bool is_aligned(const Update& u, int states) {
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  uintptr_t addresses = address(u.param) | address(u.grad);
  for (int k = 0; k < states; ++k) addresses |= address(u.states[k]);
  return cuda::is_aligned<T>(addresses);
}

// The first n elements from i on, and how they change.
template <class T>
struct Elements {
  Pack<T> w, states[most_states];

  __device__ __forceinline__ void load(const Update& u, int count, int64_t i, int64_t n, bool aligned) {
    w = cuda::load(static_cast<const T*>(u.param) + i, n, aligned);
#pragma unroll
    for (int k = 0; k < most_states; ++k)
      states[k] = k < count ? cuda::load(static_cast<const T*>(u.states[k]) + i, n, aligned) : Pack<T>{};
  }
  template <class Row>
  __device__ __forceinline__ void change(const Row& row, const Pack<T>& g) {
    for (int j = 0; j < Pack<T>::size; ++j) {
      float state[most_states];
      for (int k = 0; k < Row::states; ++k) state[k] = to_float(states[k].elements[j]);
      cuda::store(&w.elements[j], row(to_float(w.elements[j]), to_float(g.elements[j]), state));
      for (int k = 0; k < Row::states; ++k) cuda::store(&states[k].elements[j], state[k]);
    }
  }
  __device__ __forceinline__ void store(const Update& u, int count, int64_t i, int64_t n,
                                        bool aligned) const {
#pragma unroll
    for (int k = 0; k < most_states; ++k)
      if (k < count) cuda::store(static_cast<T*>(u.states[k]) + i, states[k], n, aligned);
    cuda::store(static_cast<T*>(u.param) + i, w, n, aligned);
  }
};

template <class T, class Row>
__global__ void __launch_bounds__(threads) step(const Updates table, const Optimizer o) {
  wait_for_previous(), let_next_begin();
  const int tensor = table.tensor_of(blockIdx.x);
  const Update u = table.tensors[tensor];
  const Row row = o.in_memory ? Row(u.numbers->optimizer, u.numbers->rates) : Row(o, u.rates);
  const int states = row.first ? 0 : Row::states;  // that are there
  const bool aligned = is_aligned<T>(u, Row::states);
  int64_t i = (blockIdx.x - table.first_block[tensor]) * elements_of_block<T> + threadIdx.x * Pack<T>::size;
  for (int p = 0; p < packs && i < u.size; ++p, i += threads * Pack<T>::size) {
    Elements<T> own;
    own.load(u, states, i, u.size - i, aligned);
    own.change(row, load(static_cast<const T*>(u.grad) + i, u.size - i, aligned));
    own.store(u, Row::states, i, u.size - i, aligned);
  }
}

// One launch for every 60 tensors.
template <class T>
cudaError_t run(const Optimizer& o, const Update* updates, int64_t count, cudaStream_t stream) {
  return for_tables<Updates>(updates, count, elements_of_block<T>, [&](const Updates& table, int64_t blocks) {
    return with_rule(o, [&](auto named) {
      return launch<step<T, typename decltype(named)::type>>(blocks, threads, stream, table, o);
    });
  });
}

}  // namespace fastmlp::cuda::update
