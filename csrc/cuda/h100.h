// What is taken for granted of an H100 where times are predicted, in microseconds, or in one of them. Nothing is measured
// here: latencies are as microbenchmarks of Hopper have found them (arXiv 2402.13499), barriers of a grid as those of earlier
// GPUs (arXiv 2004.05371), rates are what the kernels are expected to reach.
#pragma once

namespace fastmlp::cuda::h100 {

inline constexpr double launch = 2.0;  // from the end of a kernel of a graph to the first result of the next
inline constexpr double early =
    0.8;  // less where that has begun by then, at most 0.96 (docs/architecture.md)
inline constexpr double first_launch = 3.0;  // until a cooperative launch begins
inline constexpr double barrier =
    1.2;  // of a grid: a fence, an atomic operation, a load, each of the cache's latency
inline constexpr double phase = 0.4;  // of a product: 270 cycles for its first loads, and its sums over lanes

inline constexpr double memory_bytes = 3.0e6;  // of all multiprocessors
inline constexpr double cache_bytes = 4.0e6;
inline constexpr double cache_bytes_of_one = 1.0e5;  // 64 a cycle

inline constexpr double multiply_adds = 2.25e5;         // of a multiprocessor: 128 a cycle, of 1.755 GHz
inline constexpr double tensor_multiply_adds = 3.75e6;  // of 16 bits

}  // namespace fastmlp::cuda::h100
