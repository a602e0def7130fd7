// A whole training step in one parallel region: forward, loss, backward, and the update of the parameters.
//
// By layers, no weight's gradient outlives its layer: each tile of dW = dzᵀ x is used up, while in cache, to change its
// part of W. dx reads all of W, so it comes first, and all threads wait for it. By rows, a block of the batch
// passes through forward, loss and backward while it is in cache, and the sums of its segments are used up at the
// end. (network.h tells the two ways apart.)
#include <vector>

#include "../activation.h"
#include "loss.h"
#include "network.h"

namespace fastmlp::cpu {
namespace {

constexpr int64_t size_of_float = sizeof(float);
constexpr int64_t line = cache_line / size_of_float;  // floats

// Hands out pieces of the workspace, each from a cache line on; with no workspace it counts the bytes.
struct Pieces {
  char* begin;
  int64_t bytes = 0;

  float* floats(int64_t count) {
    char* const piece = begin ? begin + bytes : nullptr;
    bytes += ceil_div(count, line) * line * size_of_float;
    return reinterpret_cast<float*>(piece);
  }
};

bool is_trained(const Step& s, int64_t layer) {
  return s.weights[layer].optimizer || s.biases[layer].optimizer;
}

int64_t lowest_trained(const Step& s) {
  int64_t layer = 0;
  while (layer < s.count && !is_trained(s, layer)) ++layer;
  return layer;
}

// What passes through the network for some rows of the batch. Of each layer what backward reads, y or z; beside z, y in
// one of two buffers in turn, since the next layer alone reads it; and dz in one of three: one is read by two products
// while the next is written.
struct Passing {
  std::vector<float*> saved;
  float *outputs[2], *gradients[3];

  Passing(const Step& s, int64_t rows, Pieces& pieces) {
    int64_t widest = 0, widest_apart = 0;
    for (const Forward* p = s.layers; p != s.layers + s.count; ++p) {
      saved.push_back(pieces.floats(rows * p->N));
      widest = std::max(widest, p->N);
      if (reads(p->activation) == Reads::z) widest_apart = std::max(widest_apart, p->N);
    }
    for (float*& output : outputs) output = pieces.floats(rows * widest_apart);
    for (float*& gradient : gradients) gradient = pieces.floats(rows * widest);
  }
  float* y(const Step& s, int64_t layer) const {
    return reads(s.layers[layer].activation) == Reads::z ? outputs[layer % 2] : saved[layer];
  }
  float* gradient(int64_t layer) const { return gradients[layer % 3]; }
};

// The sums over the batch: dW where the batch goes by rows, and db.
struct Gradients {
  std::vector<Sums> layers;
  int64_t size;  // floats

  Gradients(const Step& s, bool by_rows, Pieces& pieces) {
    const int64_t begin = pieces.bytes;
    for (int64_t i = 0; i < s.count; ++i) {
      const Forward& p = s.layers[i];
      float* const weight = by_rows && s.weights[i].optimizer ? pieces.floats(p.N * p.K) : nullptr;
      layers.push_back({weight, s.biases[i].optimizer ? pieces.floats(p.N) : nullptr});
    }
    size = (pieces.bytes - begin) / size_of_float;
  }
};

// Where a step keeps what it works on.
struct Memory {
  bool by_rows;
  int64_t parts;                     // of the batch, whose losses and gradients are added up apart
  std::vector<Passing> passing;      // by layers, one for all threads
  std::vector<Gradients> gradients;  // by layers, one
  float* sums;     // by layers, of one weight at a time, where the batch is added up in parts
  double* losses;  // of each part
  int64_t bytes;

  Memory(const Step& s, void* workspace, int threads) : by_rows(goes_by_rows(s.layers, s.count)) {
    Pieces pieces{static_cast<char*>(workspace)};
    const int64_t M = s.layers->M;
    parts = by_rows ? segments(M) : ceil_div(M, rows_of_part(s));
    for (int i = 0; i < (by_rows ? threads : 1); ++i)
      passing.emplace_back(s, by_rows ? block_rows : M, pieces);
    for (int64_t i = 0; i < (by_rows ? parts : 1); ++i) gradients.emplace_back(s, by_rows, pieces);
    int64_t largest = 0;
    for (int64_t i = 0; i < s.count; ++i) largest = std::max(largest, s.layers[i].N * s.layers[i].K);
    sums = pieces.floats(!by_rows && M > whole_sum ? largest : 0);
    losses = reinterpret_cast<double*>(pieces.floats(2 * parts));
    bytes = pieces.bytes;
  }
  static int64_t rows_of_part(const Step& s) {
    return std::max<int64_t>(1, 4096 / std::max<int64_t>(1, s.layers[s.count - 1].N));
  }
  Range part(const Step& s, int64_t index) const {
    if (by_rows) return segment(s.layers->M, index);
    const int64_t rows = rows_of_part(s);
    return {index * rows, std::min((index + 1) * rows, s.layers->M)};
  }
};

// The layer for `rows` of the batch, whose outputs begin where the passing ones do.
Forward layer_of(const Step& s, int64_t index, Range rows, const Passing& passing) {
  Forward p = s.layers[index];
  p.M = rows.size();
  p.x = index ? passing.y(s, index - 1) : static_cast<const float*>(p.x) + rows.begin * p.ldx;
  p.y = passing.y(s, index);
  p.z = reads(p.activation) == Reads::z ? passing.saved[index] : nullptr;
  return p;
}

// The sum of the losses of rows, and their gradients. `from` is the row of the batch that the passing ones begin at.
double loss_of(const Kernels& k, const Step& s, double scale, Range rows, int64_t from,
               const Passing& passing) {
  float* const gradient = passing.gradient(s.count - 1);
  const Range own = {rows.begin - from, rows.end - from};
  if (s.loss == Loss::cross_entropy) {
    CrossEntropy p = s.cross_entropy;
    p.input = passing.y(s, s.count - 1), p.grad = gradient, p.target += from;
    return k.cross_entropy(p, float(scale), own);
  }
  Pointwise p = s.pointwise;
  p.target += from * p.N;
  return k.pointwise_loss(s.loss, p, passing.y(s, s.count - 1), float(scale), gradient,
                          {own.begin * p.N, own.end * p.N});
}

// The update of a parameter from an element on, by the gradient from there on.
Update update_of(const Trained& parameter, const float* gradient, int64_t from) {
  Update u = parameter.update;
  u.param = static_cast<float*>(u.param) + from;
  u.grad = gradient;
  for (void*& state : u.states)
    if (state) state = static_cast<float*>(state) + from;
  return u;
}

// One layer's backward pass for the part of it that belongs to `rank` of `size`. `sums.weight` null: the weights
// are changed.
void backward_layer(const Kernels& k, const Step& s, int64_t index, const Forward& p, const Memory& memory,
                    const Passing& passing, const Sums& sums, bool accumulate, int rank, int size) {
  const Trained &weight = s.weights[index], &bias = s.biases[index];
  const Trained* const trained = weight.optimizer && !memory.by_rows ? &weight : nullptr;
  const bool from_z = index > 0 && reads(s.layers[index - 1].activation) == Reads::z;
  const Backward b = {.dtype = p.dtype,
                      .reduced = p.reduced,
                      .activation = p.activation,
                      .M = p.M,
                      .N = p.N,
                      .K = p.K,
                      .grad_y = passing.gradient(index),
                      .saved = passing.saved[index],
                      .x = from_z ? passing.saved[index - 1] : p.x,
                      .ldx = p.ldx,
                      .weight = p.weight,
                      .ldw = p.ldw,
                      .grad_x = passing.gradient(index + 2),  // as index - 1
                      .grad_weight = trained ? memory.sums : sums.weight,
                      .grad_bias = sums.bias,
                      .x_activation = from_z ? s.layers[index - 1].activation : Activation{}};
  const bool needs_input = index > lowest_trained(s);
  if (needs_input) grad_input(k, b, rank, size);
  if (needs_input || memory.sums) wait(size);  // W is read no more; nor are the sums of the layer above
  if (!weight.optimizer && !bias.optimizer) return;
  const Range biases = grad_weight(k, b, sums, accumulate, trained, rank, size);
  if (!memory.by_rows && bias.optimizer && biases.size() > 0)
    k.update(*bias.optimizer, update_of(bias, sums.bias, 0), biases);
}

// Changes a range of a parameter by the sums of all parts, a piece at a time.
void finish(const Kernels& k, const Trained& parameter, const float* sums, int64_t parts, int64_t stride,
            Range range) {
  if (!parameter.optimizer) return;
  constexpr int64_t piece = 4096;
  float* const gradient = static_cast<float*>(scratch());
  for (int64_t i = range.begin; i < range.end; i += piece) {
    const Range some = {0, std::min(piece, range.end - i)};
    k.add_up(sums + i, parts, stride, Dtype::float32, gradient, some);
    k.update(*parameter.optimizer, update_of(parameter, gradient, i), some);
  }
}

void by_layers(const Kernels& k, const Step& s, double scale, const Memory& memory, int rank, int size) {
  const Passing& passing = memory.passing[0];
  const Range batch = {0, s.layers->M};
  for (int64_t i = 0; i < s.count; ++i) {
    const Forward p = layer_of(s, i, batch, passing);
    const Block y = block(p.M, k.forward_rows, p.N, k.forward_columns, rank, size);
    k.forward(p, k.runs_along_sum(p), y.rows, y.columns, scratch());
    wait(size);
  }
  const Range parts = part(memory.parts, 1, rank, size);
  for (int64_t b = parts.begin; b < parts.end; ++b)
    memory.losses[b] = loss_of(k, s, scale, memory.part(s, b), 0, passing);
  wait(size);
  for (int64_t i = s.count - 1; i >= lowest_trained(s); --i)
    backward_layer(k, s, i, layer_of(s, i, batch, passing), memory, passing, memory.gradients[0].layers[i],
                   false, rank, size);
}

void by_rows(const Kernels& k, const Step& s, double scale, const Memory& memory, int rank, int size) {
  const Passing& passing = memory.passing[rank];
  const Range parts = part(memory.parts, 1, rank, size);
  for (int64_t b = parts.begin; b < parts.end; ++b) {
    const Range rows = memory.part(s, b);
    memory.losses[b] = 0;
    for (int64_t first = rows.begin; first < rows.end; first += block_rows) {
      const Range some = {first, std::min(first + block_rows, rows.end)};
      for (int64_t i = 0; i < s.count; ++i) {
        const Forward p = layer_of(s, i, some, passing);
        k.forward(p, k.runs_along_sum(s.layers[i]), {0, p.M}, {0, p.N}, scratch());
      }
      memory.losses[b] += loss_of(k, s, scale, some, first, passing);
      for (int64_t i = s.count - 1; i >= lowest_trained(s); --i)
        backward_layer(k, s, i, layer_of(s, i, some, passing), memory, passing, memory.gradients[b].layers[i],
                       first > rows.begin, 0, 1);
    }
  }
  wait(size);
  const int64_t stride = memory.gradients[0].size;
  for (int64_t i = 0; i < s.count; ++i) {
    const Sums& sums = memory.gradients[0].layers[i];
    const Forward& p = s.layers[i];
    finish(k, s.weights[i], sums.weight, memory.parts, stride, part(p.N * p.K, int(line), rank, size));
    finish(k, s.biases[i], sums.bias, memory.parts, stride, part(p.N, int(line), rank, size));
  }
}

// What the loss and its gradient are divided by; or, as `wrong`, the first row whose target is no class.
double divisor(const Step& s, int64_t& wrong) {
  const int64_t M = s.layers->M;
  if (s.loss != Loss::cross_entropy) return s.pointwise.mean ? double(M * s.pointwise.N) : 1;
  const Losses targets = weigh(s.cross_entropy, {0, M});
  wrong = targets.wrong;
  return mean_divisor(s.cross_entropy, targets.weight);
}

}  // namespace

int64_t train_workspace(const Step& s, int threads) { return Memory(s, nullptr, threads).bytes; }

int64_t train(const Step& s, void* workspace, int threads) {
  const Kernels& k = kernels();
  const Memory memory(s, workspace, threads);
  int64_t wrong = -1;
  const double divided_by = divisor(s, wrong);
  if (wrong >= 0) return wrong;
  double work = 0;
  for (int64_t i = 0; i < s.count; ++i)
    work += 3 * double(s.layers[i].M) * double(s.layers[i].N) * double(s.layers[i].K + 1);
  share(threads, work, [&](int rank, int size) {
    (memory.by_rows ? by_rows : by_layers)(k, s, 1 / divided_by, memory, rank, size);
  });
  double sum = 0;
  for (int64_t b = 0; b < memory.parts; ++b) sum += memory.losses[b];
  *s.value = float(sum / divided_by);
  return -1;
}

}  // namespace fastmlp::cpu
