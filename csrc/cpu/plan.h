// The plan of a pass over a network: in which pieces the batch goes through the layers, and where what lies between
// them is kept.
//
// By layers: all threads share each layer, in blocks of its result, and wait for one another before the next.
// By rows: each thread takes rows of the batch through all layers, a block at a time. What passes from layer to
// layer then stays in its cache, and it waits for nobody; but each block packs the weights again, and weight
// gradients are added up by segments of the batch, in as many buffers.
// The choice, the blocks and the segments depend on the shapes alone and not on the number of threads.
#pragma once

#include <vector>

#include "threads.h"

namespace fastmlp::cpu {

constexpr int64_t block_rows = 256;
constexpr int64_t cache_line = 64;  // bytes

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Layers forward, layers backward, or both with the loss of a step between them. What the caller gives no memory for is
// the pass's own. Around a loss that is every result: backward reads what forward has kept.
struct Pass {
  const Forward* forward = nullptr;  // from the first layer to the last
  int64_t forwards = 0;
  const Backward* backward = nullptr;  // from the last to the first
  int64_t backwards = 0;
  const Step* loss = nullptr;  // the step whose loss it is
};

// Where float32 sums over the batch are kept until they are whole, for a layer's gradients to be made of them; null
// where gradients are added up in their own memory.
struct Sums {
  float *weight, *bias;
};

// Layers that go backward are counted from the last, as in the pass.
class Plan {
 public:
  Plan(const Pass& pass, void* workspace, int threads);

  int64_t bytes;  // of the workspace, which is null where only this is asked for
  Pass pass;
  Dtype dtype;
  int64_t M;
  bool by_rows;
  double multiply_adds;  // of all layers
  int64_t barriers;      // at which threads wait for each other
  int64_t segments;      // of the batch; by layers one, and one a thread where nothing is added up
  int64_t stride;        // from the sums of a segment to those of the next, in floats
  int64_t losses;        // blocks of rows whose losses are added up apart

  // A layer for some rows of the batch, with nothing left open. Of what is the pass's own, a thread's memory holds these
  // rows alone.
  Forward forward(int64_t i, Range rows, int rank) const;
  Backward backward(int64_t i, Range rows, int rank) const;
  float* loss_gradient(int rank) const { return reinterpret_cast<float*>(gradient(0, rank)); }
  Sums sums(int64_t i, int64_t segment) const;

  Range rows_of_segment(int64_t segment) const { return part(M, 16, int(segment), int(segments)); }
  Range rows_of_loss(int64_t block) const;
  double& loss(int64_t block) const { return reinterpret_cast<double*>(workspace + losses_begin)[block]; }

 private:
  // Places in the workspace are told in bytes from where a part of it begins.
  static constexpr int64_t nowhere = -1;
  struct Places {
    int64_t y = nowhere, z = nowhere;          // in a thread's part
    int64_t weight = nowhere, bias = nowhere;  // sums, in a segment's part
  };

  static char* at(char* part, int64_t place) { return place == nowhere ? nullptr : part + place; }
  char* thread(int rank) const { return workspace + threads_begin + (by_rows ? rank * thread_bytes : 0); }
  char* gradient(int64_t i, int rank) const { return at(thread(rank), gradients[i % gradient_count]); }
  char* saved(int64_t layer, int rank) const;
  size_t layer_of(int64_t i) const { return layers.size() - 1 - size_t(i); }
  int64_t rows_of_losses() const;

  char* workspace;
  std::vector<Places> layers;  // from the first
  // Of what only the next layer reads, places are taken in turn: two for y, one read while the other is written; three
  // for dz, one read by two products while the next is written.
  int64_t outputs[2], gradients[3], gradient_count;
  int64_t thread_bytes;
  int64_t threads_begin, segments_begin, losses_begin;
  int64_t weight_begin = nowhere;  // the sums of one weight at a time that is changed, by layers
};

}  // namespace fastmlp::cpu
