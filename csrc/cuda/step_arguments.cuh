// What a launch of training steps is given, and the memory that it works in.
#pragma once

#include "../optimizer.h"
#include "lanes.cuh"
#include "losses.cuh"
#include "step_plan.h"

namespace fastmlp::cuda::whole_step {

struct Layer {
  Activation activation;
  int N, K, N4, K4;  // the latter two in whole tiles: how far rows are apart, but those of W in global memory
  int units;         // of a block, in whole tiles
  int rows, columns;  // of W in shared memory: where [units, K4] is, and for the layer below [units, N4]
  const float *weight, *bias;
  float *y, *z, *dz;  // [M, N4]; no y of the last layer, no z where none is read
  struct Change {
    bool is_wanted;
    Optimizer optimizer;
    Update update;  // grad is where a gradient is kept that is to be clipped
  } changes[2];     // of the weight, the bias
};

struct Arguments {
  int steps, count, M, rows;  // the last: of the batch for a block, in whole tiles
  bool repeats, packed;       // whether each block has all of them; x, and all its rows
  const float* x;
  int64_t ldx, x_step, target_step, numbers_step;
  Layer layers[most_layers];
  Losses loss;
  double max_norm;
  int outputs;                   // where z, y and dz of those rows are in shared memory
  float* last;                   // two places of the last weight, each row before its bias: [N4, K4 + 4]
  float *losses, *value, *norm;  // [M], [steps], of the last step
  double* squares;               // [blocks]
  unsigned* arrived;             // of the grid's barrier
};
static_assert(sizeof(Arguments) <= 4096);

inline Shape shape_of(const Step& s) {
  Shape shape{s.layers->M, s.count <= most_layers ? s.count : 0, {s.layers->K}, s.max_norm > 0};
  for (int64_t l = 0; l < shape.layers; ++l) shape.widths[l + 1] = s.layers[l].N;
  return shape;
}

// In a workspace, or in one that is nowhere; `bytes` is how large it is.
inline Arguments arguments(const Step& s, const Plan& plan, char* workspace, int64_t& bytes) {
  bytes = 0;
  const auto take = [&](int64_t floats) {
    char* const own = workspace ? workspace + bytes : nullptr;
    bytes += ceil_div(floats, 32) * 128;
    return reinterpret_cast<float*>(own);
  };
  const int64_t M = s.layers->M;
  Arguments a{.steps = int(s.steps),
              .count = int(s.count),
              .M = int(M),
              .rows = int(plan.rows),
              .repeats = plan.repeats};
  a.x = static_cast<const float*>(s.layers->x), a.ldx = s.layers->ldx, a.x_step = s.x_step;
  a.packed = rows_of(a.x, a.ldx, int(s.layers->K)).packed && a.x_step % tile == 0;
  a.target_step = s.target_step, a.numbers_step = s.numbers_step;
  a.loss = {s.loss, s.cross_entropy, s.pointwise};
  a.value = s.value, a.norm = s.norm, a.max_norm = s.max_norm;
  a.arrived = reinterpret_cast<unsigned*>(take(1));  // first, so that it stays where it is
  a.losses = take(M);
  a.squares = reinterpret_cast<double*>(take(2 * plan.blocks));
  int shared = 0;
  for (int64_t l = 0; l < s.count; ++l) {
    const Forward& f = s.layers[l];
    const bool is_last = l + 1 == s.count;
    Layer& p = a.layers[l];
    p.N = int(f.N), p.K = int(f.K), p.N4 = int(padded(f.N)), p.K4 = int(padded(f.K));
    p.weight = static_cast<const float*>(f.weight), p.bias = static_cast<const float*>(f.bias);
    p.activation = f.activation, p.units = int(plan.units[l]);
    p.rows = shared;
    p.columns = shared += is_last ? 0 : p.units * p.K4;
    shared += l > 0 ? a.layers[l - 1].units * p.N4 : 0;
    if (!is_last) p.y = take((l > 0 ? 1 : 2) * M * p.N4);
    if (!is_last && reads(f.activation) == Reads::z) p.z = take(M * p.N4);
    p.dz = take(M * p.N4);
    if (is_last) a.last = take(2 * p.N4 * (p.K4 + tile));
    for (int i = 0; i < 2; ++i) {
      const Trained& t = (i ? s.biases : s.weights)[l];
      if (!t.optimizer) continue;
      p.changes[i] = {true, *t.optimizer, t.update};
      p.changes[i].update.grad = s.max_norm > 0 ? take(t.update.size) : nullptr;
    }
  }
  return a.outputs = shared, a;
}

}  // namespace fastmlp::cuda::whole_step
