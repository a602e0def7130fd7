// Losses that are a mean or a sum over elements, of one row.
#pragma once

#include "../loss.h"
#include "across.cuh"

namespace fastmlp::cuda {

// The threads of a Team share a row y of such targets. For each of them the sum of its losses; and gradient(n, dy_n · scale)
// is called for each element by one.
template <class Team, class F>
__device__ __forceinline__ float pointwise_of_row(Loss loss, const Pointwise& p, const float* y,
                                                  const float* target, float scale, F gradient) {
  float sum = 0.0f;
  for (int64_t n = Team::rank(); n < p.N; n += Team::size()) {
    const float weight = p.weight ? p.weight[n] : 1.0f, positive = p.pos_weight ? p.pos_weight[n] : 1.0f;
    float slope = 0.0f;
    with_loss(loss, [&](auto kind) {
      sum += loss_of_element<decltype(kind)::value>(y[n], target[n], weight, positive, p.bound, slope);
    });
    gradient(n, scale * slope);
  }
  return Team::template across<Sum>(sum);
}

}  // namespace fastmlp::cuda
