// Sums that several blocks have parts of: the last block to arrive adds them, whichever it is, in the same order.
#pragma once

#include <atomic>

#include "pack.cuh"
#include "plan.h"

namespace fastmlp::cuda {

// The parts are the leaves of a tree whose nodes have up to `fan` children: no block adds more of them one by one.
#ifndef FASTMLP_FAN
#define FASTMLP_FAN 16
#endif
constexpr int fan = FASTMLP_FAN;

// What a kernel is told of the splits of its tiles. For each tile there are `nodes` sums in memory, of its elements and
// one for each thread, and `groups` counts of the blocks that have arrived.
//
// A count is in memory that holds anything at first. It is one with the number of the launch beside it, and ends as none,
// as a launch in a graph has its number every time. No number of any dtype has such bits, unless it is NaN.
struct Splits {
  int count, steps, nodes = 0, groups = 0;
  unsigned long long launch = 0;
  unsigned long long* counts = nullptr;
  float* sums = nullptr;

  Splits(const Cut& cut, void* memory) : Splits(cut) {
    static std::atomic<uint32_t> launches = 0;
    launch = 0xfffb'0000'0000 + launches.fetch_add(1, std::memory_order_relaxed);
    counts = static_cast<unsigned long long*>(memory);
    sums = reinterpret_cast<float*>(static_cast<char*>(memory) + counts_bytes(cut));
  }
  static int64_t bytes(const Cut& cut, int64_t sum_size) {
    const Splits own(cut);
    return own.counts_bytes(cut) + cut.tiles * own.nodes * sum_size * int64_t{sizeof(float)};
  }

 private:
  explicit Splits(const Cut& cut) : count(int(cut.splits)), steps(int(cut.steps)) {
    for (int left = count; left > 1; left = (left + fan - 1) / fan)
      nodes += left, groups += (left + fan - 1) / fan;
  }
  int64_t counts_bytes(const Cut& cut) const { return blocks_of(cut.tiles * groups * 8, 64) * 64; }
};

// Whether the block is the last of so many.
__device__ __forceinline__ bool is_last(unsigned long long* count, unsigned long long launch,
                                        unsigned members) {
  const unsigned long long none = launch << 16;
  for (unsigned long long seen = none;;) {
    const unsigned long long next = (seen >> 16 == launch ? seen : none) + 1;
    const bool last = next - none == members;
    const unsigned long long found = atomicCAS(count, seen, last ? none : next);
    if (found == seen) return last;
    seen = found;
  }
}

// Adds the block's sums, `size` times four and one more of each thread, to those of the tile's other splits. True for the
// block that has them all then. All threads call it.
template <int threads, int size>
__device__ __forceinline__ bool add_splits(float (*sums)[4], float& sum, const Splits& splits, unsigned tile,
                                           unsigned split) {
  __shared__ bool last;
  constexpr int node_size = threads * (4 * size + 1);
  float* nodes = splits.sums + int64_t{tile} * splits.nodes * node_size;
  unsigned long long* counts = splits.counts + tile * splits.groups;
  for (unsigned count = splits.count, node = split; count > 1;) {
    float* own = nodes + node * node_size;
#pragma unroll
    for (int i = 0; i < size; ++i) {
      const float4 part{sums[i][0], sums[i][1], sums[i][2], sums[i][3]};
      *reinterpret_cast<float4*>(own + (i * threads + threadIdx.x) * 4) = part;
    }
    own[threads * 4 * size + threadIdx.x] = sum;
    __threadfence();
    __syncthreads();  // the block's sums are all in memory
    const unsigned group = node / fan, first = group * fan, left = count - first;
    const unsigned members = left < fan ? left : fan;
    if (threadIdx.x == 0) last = is_last(counts + group, splits.launch, members);
    __syncthreads();
    if (!last) return false;
    __threadfence();
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < size; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.0f;
    for (unsigned member = first; member < first + members; ++member) {
      own = nodes + member * node_size;
      sum += __ldcg(own + threads * 4 * size + threadIdx.x);
#pragma unroll
      for (int i = 0; i < size; ++i) {
        const float4 part = __ldcg(reinterpret_cast<const float4*>(own + (i * threads + threadIdx.x) * 4));
        sums[i][0] += part.x, sums[i][1] += part.y, sums[i][2] += part.z, sums[i][3] += part.w;
      }
    }
    nodes += count * node_size, counts += (count + fan - 1) / fan;
    node = group, count = (count + fan - 1) / fan;
  }
  return true;
}

}  // namespace fastmlp::cuda
