// Passes over a network, in one parallel region each: forward, backward, and a whole training step.
//
// In a step by layers no weight's gradient outlives its layer: each tile of dW = dzᵀ x is used up, while in cache, to
// change its part of W. dx reads all of W, so it comes first, and all threads wait for it. By rows, a block of the batch
// goes forward, through the loss and backward while it is in cache, and the segments' sums are used up at the end.
#include "../activation.h"
#include "loss.h"
#include "plan.h"

namespace fastmlp::cpu {
namespace {

void grad_input(const Kernels& k, const Backward& p, int rank, int size) {
  const Product dx = {.dtype = p.dtype,
                      .reduced = p.reduced,
                      .I = p.M,
                      .P = p.N,
                      .a = {p.grad_y, p.N, false, p.activation, p.saved},
                      .b = {p.weight, p.ldw},
                      .c_dtype = p.dtype,
                      .c = p.grad_x,
                      .ldc = p.K};
  const Block b = block(p.M, k.product_rows, p.K, k.product_columns, rank, size);
  k.multiply(dx, b.rows, b.columns, scratch());
}

// dW, or where `trained` is given its change by dW; and db. Returns the rows of which this thread has added up db.
Range grad_weight(const Kernels& k, const Backward& p, const Sums& sums, bool accumulate,
                  const Trained* trained, int rank, int size) {
  const bool multiplies = (p.grad_weight || sums.weight || trained) && p.K > 0;
  const Block b = multiplies ? block(p.N, k.product_rows, p.K, k.product_columns, rank, size)
                             : Block{part(p.N, k.product_rows, rank, size), {0, 0}};
  float* const bias = sums.bias ? sums.bias : static_cast<float*>(p.grad_bias);
  const bool adds_up = bias && b.columns.end == (multiplies ? p.K : 0);  // one thread alone a row of dzᵀ
  const Product dw = {.dtype = p.dtype,
                      .reduced = p.reduced,
                      .I = p.N,
                      .P = p.M,
                      .a = {p.grad_y, p.N, true, p.activation, p.saved},
                      .b = {p.x, p.ldx, false, p.x_activation},
                      .c_dtype = sums.weight ? Dtype::float32 : p.dtype,
                      .c = sums.weight ? sums.weight : p.grad_weight,
                      .ldc = p.K,
                      .accumulate = accumulate,
                      .sums = adds_up ? bias : nullptr,
                      .optimizer = trained ? trained->optimizer : nullptr,
                      .update = trained ? trained->update : Update{}};
  k.multiply(dw, b.rows, b.columns, scratch());
  return adds_up ? b.rows : Range{0, 0};
}

// Makes a range of a gradient of the segments' sums; or changes a parameter by it, a piece at a time.
void finish(const Kernels& k, const Plan& plan, const float* sums, const Trained* trained, void* gradient,
            Range range) {
  if (!trained) return k.add_up(sums, plan.segments, plan.stride, plan.dtype, gradient, range);
  constexpr int64_t piece = 4096;
  float* const some = static_cast<float*>(scratch());
  for (int64_t i = range.begin; i < range.end; i += piece) {
    const int64_t n = std::min(piece, range.end - i);
    k.add_up(sums + i, plan.segments, plan.stride, Dtype::float32, some, {0, n});
    Update u = trained->update;
    u.grad = some;
    u.param = static_cast<float*>(u.param) + i;
    for (void*& state : u.states)
      if (state) state = static_cast<float*>(state) + i;
    k.update(*trained->optimizer, u, {0, n});
  }
}

void by_layers(const Kernels& k, const Plan& plan, double scale, int rank, int size) {
  const Range batch = {0, plan.M};
  for (int64_t i = 0; i < plan.pass.forwards; ++i) {
    if (i > 0) wait(size);
    const Forward p = plan.forward(i, batch, rank);
    const Block y = block(p.M, k.forward_rows, p.N, k.forward_columns, rank, size);
    k.forward(p, k.runs_along_sum(p), y.rows, y.columns, scratch());
  }
  if (plan.pass.loss) {
    wait(size);
    const void* const y = plan.forward(plan.pass.forwards - 1, batch, rank).y;
    const Range blocks = part(plan.losses, 1, rank, size);
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      const Range rows = plan.rows_of_loss(b);
      plan.loss(b) = loss_of(k, *plan.pass.loss, scale, 0, rows, y, plan.loss_gradient(rank));
    }
    wait(size);
  }
  for (int64_t i = 0; i < plan.pass.backwards; ++i) {
    const bool is_last = i + 1 == plan.pass.backwards;
    const Backward p = plan.backward(i, batch, rank);
    const Sums sums = plan.sums(i, 0);
    if (p.grad_x) grad_input(k, p, rank, size);
    if (!is_last || sums.weight) wait(size);  // W is read no more, nor are the sums of the layer above
    if (!p.grad_weight && !p.grad_bias && !p.trained_weight && !p.trained_bias) continue;
    const Range biases = grad_weight(k, p, sums, false, p.trained_weight, rank, size);
    if (sums.bias) finish(k, plan, sums.bias, p.trained_bias, p.grad_bias, biases);
  }
}

void by_rows(const Kernels& k, const Plan& plan, double scale, int rank, int size) {
  const Pass& pass = plan.pass;
  const Range own = part(plan.segments, 1, rank, size);
  for (int64_t s = own.begin; s < own.end; ++s) {
    const Range rows = plan.rows_of_segment(s);
    double loss = 0;
    for (int64_t first = rows.begin; first < rows.end; first += block_rows) {
      const Range some = {first, std::min(first + block_rows, rows.end)};
      Forward last;
      for (int64_t i = 0; i < pass.forwards; ++i) {
        last = plan.forward(i, some, rank);
        k.forward(last, k.runs_along_sum(pass.forward[i]), {0, last.M}, {0, last.N}, scratch());
      }
      if (pass.loss) loss += loss_of(k, *pass.loss, scale, first, some, last.y, plan.loss_gradient(rank));
      for (int64_t i = 0; i < pass.backwards; ++i) {
        const Backward p = plan.backward(i, some, rank);
        const Sums sums = plan.sums(i, s);
        if (p.grad_x) grad_input(k, p, 0, 1);
        if (sums.weight || sums.bias) grad_weight(k, p, sums, first > rows.begin, nullptr, 0, 1);
      }
    }
    if (pass.loss) plan.loss(s) = loss;
  }
  if (plan.stride == 0) return;
  wait(size);
  constexpr int line = cache_line / sizeof(float);
  for (int64_t i = 0; i < pass.backwards; ++i) {
    const Backward& p = pass.backward[i];
    const Sums sums = plan.sums(i, 0);
    if (sums.weight)
      finish(k, plan, sums.weight, p.trained_weight, p.grad_weight, part(p.N * p.K, line, rank, size));
    if (sums.bias) finish(k, plan, sums.bias, p.trained_bias, p.grad_bias, part(p.N, line, rank, size));
  }
}

void run(const Plan& plan, int threads, double scale = 1) {
  const Kernels& k = kernels();
  share(threads, plan.multiply_adds, plan.barriers,
        [&](int rank, int size) { (plan.by_rows ? by_rows : by_layers)(k, plan, scale, rank, size); });
}

// The backward layers of a step, down to the lowest that is trained. Gradients that are to be clipped together are whole
// first: they have memory of their own, from `gradients` on.
struct Training {
  Training(const Step& s, float* gradients) : step(s), gradients(gradients) {
    int64_t lowest = 0;
    while (lowest < s.count && !s.weights[lowest].optimizer && !s.biases[lowest].optimizer) ++lowest;
    const bool given = s.loss == Loss::given;
    for (int64_t i = s.count - 1; i >= lowest; --i) {
      const Forward &p = s.layers[i], *const below = i > 0 ? &p - 1 : nullptr;
      const bool from_z = below && reads(below->activation) == Reads::z;
      const void* const x = !below ? p.x : from_z ? below->z : below->y;
      Backward b = {.dtype = p.dtype,
                    .reduced = p.reduced,
                    .activation = p.activation,
                    .M = p.M,
                    .N = p.N,
                    .K = p.K,
                    .grad_y = given && layers.empty() ? s.gradient : nullptr,
                    .saved = p.z ? p.z : p.y,
                    .x = x,
                    .ldx = p.ldx,
                    .weight = p.weight,
                    .ldw = p.ldw,
                    .grad_x = nullptr,
                    .grad_weight = nullptr,
                    .grad_bias = nullptr,
                    .x_activation = from_z ? below->activation : Activation{}};
      place(s.weights[i], p.N * p.K, b.grad_weight, b.trained_weight);
      place(s.biases[i], p.N, b.grad_bias, b.trained_bias);
      layers.push_back(b);
    }
  }
  Pass pass() const {
    Pass pass = {.backward = layers.data(), .backwards = int64_t(layers.size())};
    if (step.loss != Loss::given) pass.forward = step.layers, pass.forwards = step.count, pass.loss = &step;
    return pass;
  }
  int64_t bytes() const { return floats * int64_t(sizeof(float)); }  // of the gradients

  const Step& step;
  std::vector<Backward> layers;
  std::vector<Gradient> clipped;
  std::vector<Trained> changed;  // by them

 private:
  void place(const Trained& p, int64_t size, void*& gradient, const Trained*& trained) {
    if (!p.optimizer) return;
    if (step.max_norm == 0) trained = &p;
    else {
      gradient = gradients + floats;
      floats += ceil_div(size, cache_line) * cache_line;
      clipped.push_back({gradient, size});
      changed.push_back(p);
      changed.back().update.grad = gradient;
    }
  }

  float* gradients;
  int64_t floats = 0;
};

void clip_and_change(const Training& training, int threads) {
  constexpr double cost = 8;  // of an element, in multiply-adds: what reading it takes
  const Kernels& k = kernels();
  const Clip bound = {Dtype::float32, training.step.max_norm, false, training.step.norm};
  clip(bound, training.clipped.data(), int64_t(training.clipped.size()), threads);
  double elements = 0;
  for (const Trained& p : training.changed) elements += double(p.update.size);
  share(threads, cost * elements, 0, [&](int rank, int size) {
    for (const Trained& p : training.changed)
      k.update(*p.optimizer, p.update, part(p.update.size, cache_line, rank, size));
  });
}

}  // namespace

int64_t forward_workspace(const Forward* layers, int64_t count, int threads) {
  return Plan({.forward = layers, .forwards = count}, nullptr, threads).bytes;
}

void forward(const Forward* layers, int64_t count, void* workspace, int threads) {
  run(Plan({.forward = layers, .forwards = count}, workspace, threads), threads);
}

int64_t backward_workspace(const Backward* layers, int64_t count, int threads) {
  return Plan({.backward = layers, .backwards = count}, nullptr, threads).bytes;
}

void backward(const Backward* layers, int64_t count, void* workspace, int threads) {
  run(Plan({.backward = layers, .backwards = count}, workspace, threads), threads);
}

int64_t train_workspace(const Step& s, int threads) {
  const Training training(
      s, reinterpret_cast<float*>(cache_line));  // of what is nowhere the plan would keep nothing
  return training.bytes() + Plan(training.pass(), nullptr, threads).bytes;
}

int64_t train(const Step& s, void* workspace, int threads) {
  int64_t wrong = -1;
  const double divided_by = divisor(s, wrong);
  if (wrong >= 0) return wrong;
  const Training training(s, static_cast<float*>(workspace));
  const Plan plan(training.pass(), static_cast<char*>(workspace) + training.bytes(), threads);
  run(plan, threads, 1 / divided_by);
  if (s.max_norm > 0) clip_and_change(training, threads);
  double sum = 0;
  for (int64_t b = 0; b < plan.losses; ++b) sum += plan.loss(b);
  if (s.value) *s.value = float(sum / divided_by);
  return -1;
}

}  // namespace fastmlp::cpu
