// Losses: cross-entropy in blocks of rows, whose size the number of classes alone decides, and those of a step.
#pragma once

#include "backend.h"

namespace fastmlp::cpu {

// Of a block: the sum of the losses, that of the targets' weights, and the first row with a wrong target, or -1.
struct Losses {
  double loss, weight;
  int64_t wrong;
};

// The latter two of some rows.
Losses weigh(const CrossEntropy&, Range rows);

// What the mean is divided by. torch divides the smoothed part for itself, and where all weights are 0 the other part
// makes the sum 0 / 0.
inline double mean_divisor(const CrossEntropy& p, double weight) {
  if (p.reduction != Reduction::mean) return 1;
  return weight == 0 && p.label_smoothing > 0 ? __builtin_nan("") : weight;
}

// What the loss of a step and its gradient are divided by; or, as `wrong`, the first row whose target is no class.
double divisor(const Step&, int64_t& wrong);

// The sum of a step's losses of some rows, before that division; and their gradients, times `scale`. y and gradient begin
// at the row `from`.
double loss_of(const Kernels&, const Step&, double scale, int64_t from, Range rows, const void* y,
               float* gradient);

}  // namespace fastmlp::cpu
