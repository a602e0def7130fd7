// Cross-entropy over the threads: targets are looked at first, then losses and gradients are written.
#include "loss.h"

#include "threads.h"

namespace fastmlp::cpu {

Losses weigh(const CrossEntropy& p, Range rows) {
  Losses sums = {0, 0, -1};
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const int64_t t = p.target[i];
    if (t == p.ignore_index) continue;
    if (t < 0 || t >= p.C) return {0, 0, i};
    sums.weight += p.weight ? p.weight[t] : 1;
  }
  return sums;
}

namespace {

int64_t rows_of_block(const CrossEntropy& p) { return std::max<int64_t>(1, 4096 / p.C); }

// What the blocks have so far, added up in their order.
Losses total(const Losses* blocks, int64_t count) {
  Losses sums = {0, 0, -1};
  for (const Losses* b = blocks; b != blocks + count; ++b) {
    sums.loss += b->loss, sums.weight += b->weight;
    if (sums.wrong < 0) sums.wrong = b->wrong;
  }
  return sums;
}

}  // namespace

int64_t cross_entropy_workspace(const CrossEntropy& p) {
  const int64_t blocks = ceil_div(p.N, rows_of_block(p));
  return blocks > 1 ? blocks * int64_t(sizeof(Losses)) : 0;
}

int64_t cross_entropy(const CrossEntropy& p, void* workspace, int threads) {
  constexpr double exponential = 32;  // in multiply-adds
  const Kernels& k = kernels();
  const int64_t step = rows_of_block(p), count = ceil_div(p.N, step);
  Losses only;
  Losses* const blocks = count > 1 ? static_cast<Losses*>(workspace) : &only;
  int64_t wrong = -1;
  share(threads, exponential * double(p.N) * double(p.C), 3, [&](int rank, int size) {
    const Range own = part(count, 1, rank, size);
    const auto rows = [&](int64_t b) { return Range{b * step, std::min((b + 1) * step, p.N)}; };
    for (int64_t b = own.begin; b < own.end; ++b) blocks[b] = weigh(p, rows(b));
    wait(size);
    const Losses targets = total(blocks, count);
    if (targets.wrong < 0) {
      const float scale = float(1 / mean_divisor(p, targets.weight));
      wait(size);  // until all have read what is now written
      for (int64_t b = own.begin; b < own.end; ++b) blocks[b].loss = k.cross_entropy(p, scale, rows(b));
      wait(size);
    }
    if (rank > 0) return;
    wrong = targets.wrong;
    if (wrong >= 0 || p.reduction == Reduction::none) return;
    const double sum = total(blocks, count).loss;
    const float loss = float(sum / mean_divisor(p, targets.weight));
    k.add_up(&loss, 1, 0, p.dtype, p.loss, {0, 1});
  });
  return wrong;
}

double divisor(const Step& s, int64_t& wrong) {
  const int64_t M = s.layers->M;
  if (s.loss == Loss::given) return 1;
  if (s.loss != Loss::cross_entropy) return s.pointwise.mean ? double(M * s.pointwise.N) : 1;
  const Losses targets = weigh(s.cross_entropy, {0, M});
  wrong = targets.wrong;
  return mean_divisor(s.cross_entropy, targets.weight);
}

double loss_of(const Kernels& k, const Step& s, double scale, int64_t from, Range rows, const void* y,
               float* gradient) {
  const Range own = {rows.begin - from, rows.end - from};
  if (s.loss == Loss::cross_entropy) {
    CrossEntropy p = s.cross_entropy;
    p.input = y, p.grad = gradient, p.target += from;
    return k.cross_entropy(p, float(scale), own);
  }
  Pointwise p = s.pointwise;
  p.target += from * p.N;
  return k.pointwise_loss(s.loss, p, static_cast<const float*>(y), float(scale), gradient,
                          {own.begin * p.N, own.end * p.N});
}

}  // namespace fastmlp::cpu
