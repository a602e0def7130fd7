// Cross-entropy in blocks of rows, whose size the number of classes alone decides.
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

}  // namespace fastmlp::cpu
