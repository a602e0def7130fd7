// How a training step in one launch is shared out, and whether it is worth it: functions of the shapes and of a GPU's
// size alone. What they change is how long a step takes; no sum depends on it but that of a clipped norm.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastmlp::cuda::whole_step {

constexpr int most_layers = 8;
constexpr int threads = 256, own_shared_bytes = threads * sizeof(double);  // the latter for sums over a block

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t padded(int64_t n) { return ceil_div(n, 4) * 4; }  // to whole tiles

struct Shape {
  int64_t M, layers;
  int64_t widths[most_layers + 1];  // K of the first layer, then the N of each
  bool clips;
};

// Microseconds of a barrier. In the tests it costs nothing, or few rows would be one block's.
#ifndef FASTMLP_BARRIER
#define FASTMLP_BARRIER 1.2
#endif

struct Gpu {
  int64_t multiprocessors, shared_bytes;  // the latter of a block
  double barrier = FASTMLP_BARRIER;
};

struct Plan {
  int64_t blocks;              // 0 where the step does not fit, or other kernels are expected to be faster
  int64_t units[most_layers];  // of a block, of each hidden layer; a multiple of a tile
  int64_t rows;                // of the batch for a block, as well
  int64_t shared_floats, barriers;
  double microseconds;  // predicted, without the launch
};

// Rates of an H100 for a kernel of this kind, per microsecond; about half of what it can do.
constexpr double multiply_adds = 1e5, bytes_of_block = 1e5, bytes_of_all = 4e6;
constexpr double phase = 0.5;  // microseconds that its loads and sums wait
constexpr double node =
    2.5;  // of a graph: of each layer y, dx and dW; and some six of the loss and the update

// With so many units of the widest hidden layer for a block.
inline Plan planned(const Shape& s, int64_t units, const Gpu& gpu) {
  const int64_t L = s.layers, *N = s.widths + 1;
  Plan p{};
  const int64_t widest = *std::max_element(N, N + L - 1), share = ceil_div(widest, units);
  for (int64_t l = 0; l + 1 < L; ++l) {
    p.units[l] = padded(ceil_div(N[l], share));
    p.blocks = std::max(p.blocks, ceil_div(N[l], p.units[l]));
  }
  p.rows = padded(ceil_div(s.M, p.blocks));
  p.shared_floats = 3 * p.rows * padded(N[L - 1]);
  p.barriers = p.blocks > 1 ? 2 * (L - 1) + s.clips : 0;
  p.microseconds = double(p.barriers) * gpu.barrier;
  // A product of rows [m, k] with rows [n, k], which every block reads all of.
  const auto add = [&](int64_t m, int64_t n, int64_t k) {
    const double bytes = 4.0 * k * (m + n);
    p.microseconds += phase + std::max({double(m) * padded(n) * k / multiply_adds, bytes / bytes_of_block,
                                        bytes * p.blocks / bytes_of_all});
  };
  for (int64_t l = 0; l < L; ++l) {
    const int64_t K = s.widths[l];
    if (l + 1 < L) {
      p.shared_floats += p.units[l] * padded(K);
      add(s.M, p.units[l], K);
      add(s.M, p.units[l], K);  // dW
    } else {
      add(p.rows, N[l], K);
      add(s.M, p.units[l - 1], N[l]);  // dW
    }
    if (l > 0) {
      p.shared_floats += p.units[l - 1] * padded(N[l]);
      add(s.M, p.units[l - 1], N[l]);  // dx
    }
  }
  const bool fits =
      4 * p.shared_floats + own_shared_bytes <= gpu.shared_bytes && p.blocks <= gpu.multiprocessors;
  if (!fits || p.microseconds > node * (3.0 * L + 6 + 3 * s.clips)) p.blocks = 0;
  return p;
}

inline Plan plan(const Shape& s, const Gpu& gpu) {
  Plan best{};
  const int64_t L = s.layers;
  if (L < 2 || L > most_layers || s.M < 1 || s.M > 1 << 16) return best;
  for (const int64_t* width = s.widths; width <= s.widths + L; ++width)
    if (*width < 1 || *width > 1 << 13) return best;
  const int64_t widest = *std::max_element(s.widths + 1, s.widths + L);
  for (int64_t units = 4;; units *= 2) {
    const Plan p = planned(s, units, gpu);
    if (p.blocks && (!best.blocks || p.microseconds < best.microseconds)) best = p;
    if (units >= widest) return best;
  }
}

}  // namespace fastmlp::cuda::whole_step
