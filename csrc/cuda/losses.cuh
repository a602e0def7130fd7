// The losses of a training step, row by row.
#pragma once

#include "../loss.h"
#include "softmax.cuh"

namespace fastmlp::cuda {

// One that the kernels know. Its first target is that of row 0.
struct Losses {
  Loss loss;
  CrossEntropy cross_entropy;
  Pointwise pointwise;

  // What the loss of M rows and its gradient are divided by, for each thread of a Team.
  template <class Team>
  __device__ __forceinline__ float divisor(int M, int64_t first) const {
    if (loss != Loss::cross_entropy) return pointwise.mean ? static_cast<float>(M * pointwise.N) : 1.0f;
    float sum = 0.0f;
    for (int m = Team::rank(); m < M; m += Team::size())
      sum += softmax::target_weight(cross_entropy, cross_entropy.target[first + m]);
    return softmax::divisor(cross_entropy, Team::template across<Sum>(sum));
  }

  // The threads of a Team share a row y. For each of them its loss; and gradient(n, dy_n · scale) is called for each element
  // by one.
  template <class Team, class F>
  __device__ __forceinline__ float of_row(const float* y, int row, int64_t first, float scale,
                                          F gradient) const {
    if (loss == Loss::cross_entropy)
      return softmax::of_row<Team>(cross_entropy, y, cross_entropy.target[first + row], scale, gradient);
    const Pointwise& p = pointwise;
    const float* const target = p.target + first + row * p.N;
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
};

}  // namespace fastmlp::cuda
