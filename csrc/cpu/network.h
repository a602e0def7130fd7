// How a network passes through the threads, and the backward pass of one layer.
//
// By layers: all threads share each layer, in blocks of its result, and wait for one another before the next.
// By rows: each thread takes rows of the batch through all layers, a block at a time. What passes from layer to
// layer then stays in its cache, and it waits for nobody; but each block packs the weights again, and weight
// gradients are added up by segments of the batch, in as many buffers.
// The choice, the blocks and the segments depend on the shapes alone and not on the number of threads.

#pragma once

#include "threads.h"

namespace fastmlp::cpu {

constexpr int64_t block_rows = 256;
constexpr int64_t cache_line = 64;  // bytes

template <class Layer>
bool goes_by_rows(const Layer* layers, int64_t count) {
  constexpr int64_t most_weights = 1 << 17, least_rows = 1024;
  int64_t weights = 0;
  for (const Layer* p = layers; p != layers + count; ++p) weights += p->N * p->K;
  return layers->M >= least_rows && weights <= most_weights;
}

inline int64_t segments(int64_t M) { return std::min<int64_t>(16, M / block_rows); }

inline Range segment(int64_t M, int64_t index) { return part(M, 16, int(index), int(segments(M))); }

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Where the float32 sums of a layer's weight and bias gradients are: the gradients themselves, or partial sums.
struct Sums {
  float *weight, *bias;
};

// A layer's gradients, for the part of them that belongs to `rank` of `size`. Where `trained` is given, it is
// changed by its gradient, and grad_weight is only where sums may stay until they are whole. Returns the rows of dW whose sums, db, this thread has added up.
void grad_input(const Kernels&, const Backward&, int rank, int size);
Range grad_weight(const Kernels&, const Backward&, const Sums&, bool accumulate, const Trained* trained,
                  int rank, int size);

}  // namespace fastmlp::cpu
