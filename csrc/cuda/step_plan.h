// How a training step in one launch is shared out, and whether it is worth it: functions of the shapes and of a GPU's
// size alone. What they change is how long a step takes; no sum depends on it but that of a clipped norm.
#pragma once

#include <algorithm>
#include <cstdint>

#include "h100.h"

namespace fastmlp::cuda::whole_step {

constexpr int most_layers = 8, long_sum = 128;  // of so many terms 32 lanes share a sum
constexpr int threads = 256, own_shared_bytes = threads * sizeof(double);  // the latter for sums over a block

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t padded(int64_t n) { return ceil_div(n, 4) * 4; }  // to whole tiles

struct Shape {
  int64_t M, layers;
  int64_t widths[most_layers + 1];  // K of the first layer, then the N of each
  bool clips;
};

// Microseconds of a barrier. In the tests it costs nothing, or few rows would be one block's; and they ask for what each block
// does.
#ifndef FASTMLP_BARRIER
#define FASTMLP_BARRIER h100::barrier
#define FASTMLP_REPEATS false, true
#endif

struct Gpu {
  int64_t multiprocessors, shared_bytes;  // the latter of a block
  double barrier = FASTMLP_BARRIER;
};

struct Plan {
  int64_t blocks;              // 0 where the step does not fit, or other kernels are expected to be faster
  int64_t units[most_layers];  // of a block, of each hidden layer; a multiple of a tile
  int64_t rows;                // of the batch for a block, as well
  bool repeats;                // each block does all rows of the last layer
  int64_t shared_floats, barriers;
  double microseconds;  // predicted
};

// With so many units of the widest hidden layer for a block.
inline Plan planned(const Shape& s, int64_t units, bool repeats, const Gpu& gpu) {
  const int64_t L = s.layers, *N = s.widths + 1;
  Plan p{};
  const int64_t widest = *std::max_element(N, N + L - 1), share = ceil_div(widest, units);
  for (int64_t l = 0; l + 1 < L; ++l) {
    p.units[l] = padded(ceil_div(N[l], share));
    p.blocks = std::max(p.blocks, ceil_div(N[l], p.units[l]));
  }
  p.repeats = repeats || p.blocks == 1;
  p.rows = padded(p.repeats ? s.M : ceil_div(s.M, p.blocks));
  p.shared_floats = 3 * p.rows * padded(N[L - 1]);
  p.barriers = p.blocks > 1 ? 2 * (L - 1) - p.repeats + s.clips : 0;
  const double barrier = p.blocks > 1 ? gpu.barrier : 0;
  // Tiles of sums, each shared by some lanes, which take most of the time to load: 12 packs are to 128 multiply-adds of large
  // tiles, which take 48 and 32 cycles, and 8 to 64 of others, which take 32 and 16. 80 % of that are expected.
  const auto time = [&](int64_t tiles, int64_t lanes, int64_t size, int64_t K, int64_t floats) {
    const double steps = double(std::max<int64_t>(tiles * lanes, threads)) * ceil_div(K, 4 * lanes);
    const double rate = 0.8 * h100::multiply_adds * (size > 16 ? 2.0 / 3 : 0.5), bytes = 4.0 * floats;
    return h100::phase + std::max({steps * 4 * size / rate, bytes / h100::cache_bytes_of_one,
                                   bytes * p.blocks / h100::cache_bytes});
  };
  // Of rows [m, K] with rows [n, K], as lanes.cuh has it; of these so many floats are not in shared memory.
  const auto product = [&](int64_t m, int64_t n, int64_t K, int64_t floats) {
    const int64_t lanes = K < long_sum ? 8 : 32, height = lanes == 32 && m > 4 ? 8 : 4;
    return time(ceil_div(m, height) * ceil_div(n, 4), lanes, 4 * height, K, floats);
  };
  // dW [n, k], and the change of W.
  const auto change = [&](int64_t n, int64_t k) {
    return time(ceil_div(n, 4) * (ceil_div(k, 4) + 1), 4, 16, s.M, s.M * (n + k) + 2 * n * k);
  };
  p.microseconds = h100::first_launch + (s.clips ? barrier : 0);
  for (int64_t l = 0; l < L; ++l) {
    const int64_t K = s.widths[l], units = p.units[l];
    if (l + 1 < L) {
      p.shared_floats += units * padded(K);
      p.microseconds += product(s.M, units, K, s.M * K + units * K) + barrier + change(units, K);
    } else {
      p.microseconds += product(p.rows, N[l], K, (p.rows + N[l]) * K) + h100::phase;  // with the loss
      p.microseconds += (p.repeats ? 0 : barrier) + change(N[l], p.units[l - 1]);
    }
    if (l > 0) {
      p.shared_floats += p.units[l - 1] * padded(N[l]);
      p.microseconds += product(s.M, p.units[l - 1], N[l], s.M * N[l]);  // dx
    }
    if (l > 1) {  // others wait for dx, and change W meanwhile
      const double of_change = l + 1 < L ? change(units, K) : change(N[l], p.units[l - 1]);
      p.microseconds += std::max(barrier - of_change, 0.0);
    }
  }
  const bool fits =
      4 * p.shared_floats + own_shared_bytes <= gpu.shared_bytes && p.blocks <= gpu.multiprocessors;
  // A graph has of each layer y, dx and dW, some six of the loss and the change, and three of clipping.
  const double graph = (h100::launch - h100::early + h100::phase) * (3.0 * L + 6 + 3 * s.clips);
  if (!fits || p.microseconds > graph) p.blocks = 0;
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
    for (const bool repeats : {FASTMLP_REPEATS}) {
      const Plan p = planned(s, units, repeats, gpu);
      if (p.blocks && (!best.blocks || p.microseconds < best.microseconds)) best = p;
    }
    if (units >= widest) return best;
  }
}

}  // namespace fastmlp::cuda::whole_step
