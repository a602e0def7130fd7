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

}  // namespace fastmlp::cpu
