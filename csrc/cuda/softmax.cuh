// Cross-entropy over rows of logits: the targets' weights, each row's loss and gradient, the sum of the losses.
//
//   lse - z_t = log Σ_c e^(z_c - top) + (top - z_t)     top = max_c z_c
//
// Bound by the latency of three launches for a batch of common size, by bandwidth for a large one. All sums are in
// float32 and in an order that the shape alone decides, so the same input gives the same bits.
#pragma once

#include <cassert>
#include <cmath>

#include "../activation.h"
#include "across.cuh"

namespace fastmlp::cuda::softmax {

constexpr int few = 32, many = most_threads;  // threads of a block: for rows of few classes one warp each

__device__ __forceinline__ float sum_of(const float* values, int64_t count) {
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += values[i];
  return across<Sum>(sum);
}

// w_t of a row; 0 where it is ignored.
__device__ __forceinline__ float target_weight(const CrossEntropy& p, int64_t t) {
  if (t == p.ignore_index) return 0.0f;
  assert(t >= 0 && t < p.C);
  return p.weight ? p.weight[t] : 1.0f;
}

// What the mean is divided by, where the targets' weights have that sum. torch divides the smoothed part for itself, and
// where all weights are 0 the other part makes the sum 0 / 0.
__device__ __forceinline__ float divisor(const CrossEntropy& p, float sum) {
  if (p.reduction != Reduction::mean) return 1.0f;
  return sum == 0.0f && p.label_smoothing > 0.0f ? NAN : sum;
}
__device__ __forceinline__ float divisor(const CrossEntropy& p, const float* weights, int64_t weights_count) {
  return divisor(p, p.reduction == Reduction::mean ? sum_of(weights, weights_count) : 0.0f);
}

// The threads of a Team share a row z of target t. For each of them its loss; and gradient(c, dz_c · scale) is called for
// each class by one.
template <class Team, class T, class F>
__device__ __forceinline__ float of_row(const CrossEntropy& p, const T* z, int64_t t, float scale,
                                        F gradient) {
  const float kept = 1.0f - p.label_smoothing, spread = p.label_smoothing / p.C;
  const bool smooths = spread > 0.0f;
  float all_weights = p.C;
  if (smooths && p.weight) {
    all_weights = 0.0f;
    for (int64_t c = Team::rank(); c < p.C; c += Team::size()) all_weights += p.weight[c];
    all_weights = Team::template across<Sum>(all_weights);
  }
  float top = -INFINITY;
  for (int64_t c = Team::rank(); c < p.C; c += Team::size()) top = Larger::of(to_float(z[c]), top);
  top = Team::template across<Larger>(top);

  float sum = 0.0f, distance = 0.0f;  // distance: Σ_c w_c (top - z_c)
  for (int64_t c = Team::rank(); c < p.C; c += Team::size()) {
    const float below = to_float(z[c]) - top;
    sum += exponential(below);
    if (smooths) distance -= (p.weight ? p.weight[c] : 1.0f) * below;
  }
  sum = Team::template across<Sum>(sum);
  if (smooths) distance = Team::template across<Sum>(distance);

  const bool counts = t != p.ignore_index;
  const float w = target_weight(p, t);
  float loss = 0.0f;
  if (counts) {
    const float log_sum = logf(sum);
    loss = kept * w * (log_sum + (top - to_float(z[t])));
    if (smooths) loss += spread * (log_sum * all_weights + distance);
  }
  const float ratio = (counts ? scale * (kept * w + spread * all_weights) : 0.0f) / sum;
  for (int64_t c = Team::rank(); c < p.C; c += Team::size()) {
    float dz = exponential(to_float(z[c]) - top) * ratio;
    if (counts && c == t) dz -= scale * (kept * w);
    if (counts && smooths) dz -= scale * spread * (p.weight ? p.weight[c] : 1.0f);
    gradient(c, dz);
  }
  return loss;
}

// The blocks share the rows out one by one in turn; each writes what its own add up to.
__global__ void __launch_bounds__(many) weigh(const CrossEntropy p, float* weights) {
  wait_for_previous(), let_next_begin();
  float sum = 0.0f;
  for (int64_t i = blockIdx.x * int64_t{many} + threadIdx.x; i < p.N; i += int64_t{gridDim.x} * many)
    sum += target_weight(p, p.target[i]);
  sum = across<Sum>(sum);
  if (threadIdx.x == 0) weights[blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(many, 1)
    rows(const CrossEntropy p, const float* weights, int64_t weights_count, float* losses) {
  wait_for_previous(), let_next_begin();
  const float scale = 1.0f / divisor(p, weights, weights_count);
  float block_loss = 0.0f;
  for (int64_t row = blockIdx.x; row < p.N; row += gridDim.x) {
    const T* const z = static_cast<const T*>(p.input) + row * p.C;
    const float loss = of_row<Block>(p, z, p.target[row], scale, [&](int64_t c, float dz) {
      if (p.grad) p.grad[row * p.C + c] = dz;
    });
    if (threadIdx.x > 0) continue;
    if (p.reduction == Reduction::none) store(static_cast<T*>(p.loss) + row, loss);
    block_loss += loss;
  }
  if (threadIdx.x == 0) losses[blockIdx.x] = block_loss;
}

template <class T>
__global__ void __launch_bounds__(many)
    reduce(const CrossEntropy p, const float* weights, int64_t weights_count, const float* losses,
           int64_t losses_count) {
  wait_for_previous(), let_next_begin();
  const float loss = sum_of(losses, losses_count) / divisor(p, weights, weights_count);
  if (threadIdx.x == 0) store(static_cast<T*>(p.loss), loss);
}

// The blocks of `rows`, and of `weigh`, whose sums every block of `rows` adds up again.
inline int64_t blocks(const CrossEntropy& p) { return p.N < 4096 ? p.N : 4096; }
inline int64_t weighing_blocks(const CrossEntropy& p) {
  const int64_t wanted = (p.N + 1023) / 1024;
  return wanted < 256 ? wanted : 256;
}

inline int64_t workspace(const CrossEntropy& p) {
  return (blocks(p) + weighing_blocks(p)) * int64_t{sizeof(float)};
}

template <class T>
cudaError_t cross_entropy(const CrossEntropy& p, float* losses, cudaStream_t stream) {
  float* const weights = losses + blocks(p);
  cudaError_t error = cudaSuccess;
  if (p.reduction == Reduction::mean) error = launch<weigh>(weighing_blocks(p), many, stream, p, weights);
  if (error == cudaSuccess)
    error =
        launch<rows<T>>(blocks(p), p.C <= 1024 ? few : many, stream, p, weights, weighing_blocks(p), losses);
  if (error == cudaSuccess && p.reduction != Reduction::none)
    error = launch<reduce<T>>(1, many, stream, p, weights, weighing_blocks(p), losses, blocks(p));
  return error;
}

}  // namespace fastmlp::cuda::softmax
