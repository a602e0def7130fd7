// Decides how a pass goes, and lays out its memory.
#include "plan.h"

#include <type_traits>

#include "../activation.h"

namespace fastmlp::cpu {
namespace {

// Lays pieces one after the other, each from a cache line on.
struct Arena {
  int64_t bytes = 0;

  int64_t piece(int64_t size) {
    const int64_t begin = bytes;
    bytes += ceil_div(size, cache_line) * cache_line;
    return begin;
  }
};

constexpr int64_t size_of_float = sizeof(float);

struct Work {
  int64_t weights = 0;
  double multiply_adds = 0;

  template <class Layer>
  Work(const Layer* layers, int64_t count, double products) {
    for (const Layer* p = layers; p != layers + count; ++p) {
      weights += p->N * p->K;
      const double uses = double(p->M) + 1;  // of a weight: reading it costs about one more
      multiply_adds += products * uses * double(p->N) * double(p->K + 1);
    }
  }
};

template <class T>
T* offset(T* pointer, int64_t bytes) {
  using Char = std::conditional_t<std::is_const_v<T>, const char, char>;
  return pointer ? static_cast<Char*>(pointer) + bytes : nullptr;
}

}  // namespace

Plan::Plan(const Pass& pass, void* workspace, int threads)
    : pass(pass), workspace(static_cast<char*>(workspace)) {
  constexpr int64_t most_weights = 1 << 17, least_rows = 1024;
  const Work forward(pass.forward, pass.forwards, 1), backward(pass.backward, pass.backwards, 2);
  dtype = pass.forward ? pass.forward->dtype : pass.backward->dtype;
  M = pass.forward ? pass.forward->M : pass.backward->M;
  multiply_adds = forward.multiply_adds + backward.multiply_adds;
  by_rows = M >= least_rows && std::max(forward.weights, backward.weights) <= most_weights;
  segments = !by_rows ? 1 : pass.backwards || pass.loss ? std::min<int64_t>(16, M / block_rows) : threads;
  losses = !pass.loss ? 0 : by_rows ? segments : ceil_div(M, rows_of_losses());
  layers.resize(size_t(std::max(pass.forwards, pass.backwards)));

  Arena thread, segment, all;
  const int64_t row = (by_rows ? block_rows : M) * size_of(dtype);
  // Whether the next layer alone reads y.
  const auto is_passed_on = [&](const Forward& p) {
    return pass.loss ? reads(p.activation) == Reads::z : !p.y;
  };
  int64_t widest = 0, count = 0, largest = 0;
  for (int64_t i = 0; i < pass.forwards; ++i) {
    const Forward& p = pass.forward[i];
    if (is_passed_on(p)) widest = std::max(widest, p.N), ++count;
    if (pass.loss) (is_passed_on(p) ? layers[i].z : layers[i].y) = thread.piece(row * p.N);
  }
  for (int64_t i = 0; i < std::min<int64_t>(count, 2); ++i) outputs[i] = thread.piece(row * widest);
  for (int64_t i = 0; i < pass.forwards; ++i)
    if (is_passed_on(pass.forward[i])) layers[i].y = outputs[i % std::min<int64_t>(count, 2)];

  widest = pass.loss ? pass.forward[pass.forwards - 1].N : 0, count = pass.loss ? 1 : 0;
  for (int64_t i = 0; i < pass.backwards; ++i) {
    const Backward& p = pass.backward[i];
    Places& places = layers[layer_of(i)];
    if (i > 0) widest = std::max(widest, p.N), ++count;
    if (by_rows && (p.grad_weight || p.trained_weight))
      places.weight = segment.piece(p.N * p.K * size_of_float);
    else if (p.trained_weight && M > whole_sum) largest = std::max(largest, p.N * p.K);
    if (p.trained_bias || (p.grad_bias && (by_rows || dtype != Dtype::float32)))
      places.bias = segment.piece(p.N * size_of_float);
  }
  gradient_count = std::min<int64_t>(count, 3);
  for (int64_t i = 0; i < gradient_count; ++i) gradients[i] = thread.piece(row * widest);

  thread_bytes = thread.bytes, stride = segment.bytes / size_of_float;
  threads_begin = all.piece(thread_bytes * (by_rows ? threads : 1));
  segments_begin = all.piece(segment.bytes * segments);
  losses_begin = all.piece(losses * int64_t(sizeof(double)));
  if (largest) weight_begin = all.piece(largest * size_of_float);
  const bool last_is_summed = largest && pass.backward[pass.backwards - 1].trained_weight;
  const int64_t between = std::max<int64_t>(pass.forwards, 1) + std::max<int64_t>(pass.backwards, 1) - 2;
  barriers = by_rows ? stride > 0 : between + (pass.loss ? 2 : 0) + last_is_summed;
  bytes = all.bytes;
}

Forward Plan::forward(int64_t i, Range rows, int rank) const {
  Forward p = pass.forward[i];
  const int64_t size = size_of(dtype);
  p.M = rows.size();
  p.x = p.x || i == 0 ? offset(p.x, rows.begin * p.ldx * size) : at(thread(rank), layers[size_t(i) - 1].y);
  p.y = p.y ? offset(p.y, rows.begin * p.N * size) : at(thread(rank), layers[size_t(i)].y);
  p.z = p.z ? offset(p.z, rows.begin * p.N * size) : at(thread(rank), layers[size_t(i)].z);
  return p;
}

Backward Plan::backward(int64_t i, Range rows, int rank) const {
  Backward p = pass.backward[i];
  const int64_t size = size_of(dtype), layer = int64_t(layer_of(i));
  p.M = rows.size();
  p.grad_y = i > 0 || pass.loss ? gradient(i, rank) : offset(p.grad_y, rows.begin * p.N * size);
  p.saved = p.saved ? offset(p.saved, rows.begin * p.N * size) : saved(layer, rank);
  p.x = p.x ? offset(p.x, rows.begin * p.ldx * size) : saved(layer - 1, rank);
  p.grad_x = i + 1 < pass.backwards ? gradient(i + 1, rank) : offset(p.grad_x, rows.begin * p.K * size);
  return p;
}

char* Plan::saved(int64_t layer, int rank) const {
  if (layer < 0) return nullptr;
  const Places& places = layers[size_t(layer)];
  return at(thread(rank), places.z == nowhere ? places.y : places.z);
}

Sums Plan::sums(int64_t i, int64_t segment) const {
  const Places& places = layers[layer_of(i)];
  char* const part = workspace + segments_begin + segment * stride * size_of_float;
  char* const weight_sums =
      !by_rows && pass.backward[i].trained_weight ? at(workspace, weight_begin) : at(part, places.weight);
  return {reinterpret_cast<float*>(weight_sums), reinterpret_cast<float*>(at(part, places.bias))};
}

// Enough rows at a time to keep them apart worth while.
int64_t Plan::rows_of_losses() const {
  return std::max<int64_t>(1, 4096 / std::max<int64_t>(1, pass.forward[pass.forwards - 1].N));
}

Range Plan::rows_of_loss(int64_t block) const {
  if (by_rows) return rows_of_segment(block);
  const int64_t rows = rows_of_losses();
  return {block * rows, std::min((block + 1) * rows, M)};
}

}  // namespace fastmlp::cpu
