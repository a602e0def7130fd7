// Work over the threads of the caller's OpenMP pool.
//
// Threads share the output, never a sum: each element is added up by one thread in an order that its position
// alone decides. So the result is the same to the bit for every number of threads.
#pragma once

#include <omp.h>

#include <algorithm>

#include "backend.h"

namespace fastmlp::cpu {

// libgomp's threads do not survive a fork, and its pool waits for them for ever: a child works alone.
bool is_forked();

// The tests set it to 0, and so share everything.
#ifndef FASTMLP_COST_OF_THREADS
#define FASTMLP_COST_OF_THREADS 1
#endif

// Whether n threads take less time than one. It is the pool or nobody: libgomp ends the threads that a smaller team leaves
// out, and starts them anew for torch's next region (https://github.com/openfheorg/openfhe-development/issues/1300).
//
// Work is in multiply-adds, of which a thread does some 64 in a nanosecond in small layers with AVX-512; fewer without, and
// then there is the more to share. libgomp's barrier is a counter that all threads change one after the other, so its
// time grows with n, as that of a region does: on 96 cores of Zen 2 a region takes 30 µs, 0.3 a thread
// (https://github.com/dyninst/dyninst/issues/2403). On two of Zen 5 an empty one was measured to take 0.4 µs and a barrier
// 0.2, but in forward passes and steps of small networks about 1.5 and 1.2: what one writes the other must fetch.
//
// All that is of a pool that is awake, as it stays for some milliseconds after its last region. One that sleeps takes 35
// µs, and nothing but a clock tells which it is: calls that far apart are rarely the ones whose time counts.
inline bool pays(int threads, double multiply_adds, int64_t barriers,
                 double scale = FASTMLP_COST_OF_THREADS) {
  constexpr double microsecond = 64e3;
  const double n = threads, region = 0.9 + 0.3 * n, barrier = 0.6 + 0.3 * n;
  const double cost = scale * microsecond * (region + double(barriers) * barrier);
  return multiply_adds - multiply_adds / n >= cost;
}

// Runs work(rank, size) on `size` threads at once, which wait for each other so many times; or on this one where there
// is too little of it.
template <class Work>
void share(int threads, double multiply_adds, int64_t barriers, Work work) {
  if (threads <= 1 || !pays(threads, multiply_adds, barriers) || omp_in_parallel() || is_forked())
    return work(0, 1);
#pragma omp parallel
  work(omp_get_thread_num(), omp_get_num_threads());
}

// Waits for the other threads that share() runs; alone, there is nobody, whoever's region this thread is in.
inline void wait(int size) {
  if (size > 1) {
#pragma omp barrier
  }
}

// The part of 0 <= i < size that belongs to `rank` of `parts`, in whole tiles.
inline Range part(int64_t size, int tile, int rank, int parts) {
  const int64_t tiles = ceil_div(size, tile);
  const auto bound = [&](int64_t r) { return std::min(size, tiles * r / parts * tile); };
  return {bound(rank), bound(rank + 1)};
}

// The elements of all tensors in cache lines, as if the tensors lay one after the other: how threads share them.
template <class Tensor>
struct Lines {
  const Tensor* tensors;  // each with its size
  int64_t count, length;  // of tensors; of a line, in elements

  int64_t total() const {
    int64_t lines = 0;
    for (const Tensor* t = tensors; t != tensors + count; ++t) lines += ceil_div(t->size, length);
    return lines;
  }

  // Calls f(tensor, range) with the elements of some of the lines.
  template <class F>
  void visit(Range lines, F f) const {
    for (const Tensor* t = tensors; t != tensors + count && lines.end > 0; ++t) {
      const auto bound = [&](int64_t at) { return std::clamp<int64_t>(at * length, 0, t->size); };
      const Range range = {bound(lines.begin), bound(lines.end)};
      if (range.size() > 0) f(*t, range);
      lines.begin -= ceil_div(t->size, length);
      lines.end -= ceil_div(t->size, length);
    }
  }
};

// Each thread's memory for packed blocks. Nothing in it outlives a call.
inline void* scratch() {
  alignas(64) static thread_local char memory[scratch_bytes];
  return memory;
}

struct Block {
  Range rows, columns;
};

// The block of a matrix that belongs to `rank` of `size`: of the grids of threads, the one whose largest
// block has the fewest tiles, then the one whose blocks read the least of both operands.
inline Block block(int64_t rows, int row_tile, int64_t columns, int column_tile, int rank, int size) {
  int best = 1;
  int64_t best_tiles = INT64_MAX, best_edge = INT64_MAX;
  for (int down = 1; down <= size; ++down) {
    if (size % down) continue;
    const int64_t m = ceil_div(ceil_div(rows, row_tile), down);
    const int64_t n = ceil_div(ceil_div(columns, column_tile), size / down);
    const int64_t edge = m * row_tile + n * column_tile;
    if (m * n < best_tiles || (m * n == best_tiles && edge < best_edge))
      best = down, best_tiles = m * n, best_edge = edge;
  }
  const int across = size / best;
  return {part(rows, row_tile, rank / across, best), part(columns, column_tile, rank % across, across)};
}

}  // namespace fastmlp::cpu
