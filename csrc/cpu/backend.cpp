// The CPU backend: chooses the instruction set and splits work over the threads of the caller's OpenMP pool.
//
// Threads share the output, never a sum: each element is added up by one thread in an order that its position
// alone decides. So the result is the same to the bit for every number of threads.
#include "backend.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstring>

namespace fastmlp::cpu {
namespace {

struct InstructionSet {
  const char* name;
  const Kernels* kernels;  // null where the processor lacks it
};

// The tests emulate what their processor lacks: see avx512_emulator.h.
#ifndef FASTMLP_EMULATE_AVX512
#define FASTMLP_EMULATE_AVX512 0
#endif
#ifndef FASTMLP_EMULATE_AVX512BF16
#define FASTMLP_EMULATE_AVX512BF16 0
#endif

const InstructionSet* find(const char* name) {
#ifdef __x86_64__
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool has_avx512 =
      FASTMLP_EMULATE_AVX512 || (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"));
  static const bool has_pairs =
      FASTMLP_EMULATE_AVX512BF16 || (has_avx512 && __builtin_cpu_supports("avx512bf16"));
  static const InstructionSet sets[] = {{instruction_sets[0], has_pairs ? &avx512bf16_kernels : nullptr},
                                        {instruction_sets[1], has_avx512 ? &avx512_kernels : nullptr},
                                        {instruction_sets[2], has_avx2 ? &avx2_kernels : nullptr},
                                        {instruction_sets[3], &portable_kernels}};
#else
  static const InstructionSet sets[] = {{instruction_sets[3], &portable_kernels}};
#endif
  for (const InstructionSet& set : sets)
    if (set.kernels && (!name || !std::strcmp(name, set.name))) return &set;
  return nullptr;
}

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set{find(nullptr)};
  return set;
}

std::atomic<bool> asked_for{false};  // by use()

// libgomp's threads do not survive a fork, and its pool waits for them for ever: a child works alone.
std::atomic<bool> forked{false};
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Waking the pool costs about as much as this many multiply-adds on one core. (The tests set it to 0.)
#ifndef FASTMLP_LEAST_PARALLEL_WORK
#define FASTMLP_LEAST_PARALLEL_WORK (1 << 19)
#endif

// Runs work(rank, size) on `size` threads at once, or on this one where there is too little of it.
template <class Work>
void share(int threads, double multiply_adds, Work work) {
  if (threads <= 1 || multiply_adds < FASTMLP_LEAST_PARALLEL_WORK || omp_in_parallel() || forked)
    return work(0, 1);
#pragma omp parallel
  work(omp_get_thread_num(), omp_get_num_threads());
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The part of 0 <= i < size that belongs to `rank` of `parts`, in whole tiles.
Range part(int64_t size, int tile, int rank, int parts) {
  const int64_t tiles = ceil_div(size, tile);
  const auto bound = [&](int64_t r) { return std::min(size, tiles * r / parts * tile); };
  return {bound(rank), bound(rank + 1)};
}

struct Block {
  Range rows, columns;
};

// The block of a matrix that belongs to `rank` of `size`: of the grids of threads, the one whose largest
// block has the fewest tiles, then the one whose blocks read the least of both operands.
Block block(int64_t rows, int row_tile, int64_t columns, int column_tile, int rank, int size) {
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

// Whether the backward's products take bfloat16 in pairs. Their right operands are then copied, which fewer
// rows than these do not pay for.
bool in_pairs(const Kernels& k, const Backward& p) {
  constexpr int64_t least_rows = 16;
  return k.pair_lanes && p.dtype == Dtype::bfloat16 && p.M >= least_rows;
}

// Bytes of dz in rows of pairs, up to a multiple of a cache line. Its pairs of rows follow.
int64_t rows_size(const Backward& p) { return ceil_div(p.M * p.N * 2, 64) * 64; }

// float32's dz needs memory of its own unless it is grad_y itself.
bool dz_is_grad_y(const Backward& p) {
  return p.activation == Activation::identity && p.dtype == Dtype::float32;
}

}  // namespace

const char* instruction_set() { return chosen().load()->name; }

bool supports(const char* instruction_set) { return find(instruction_set); }

bool use(const char* instruction_set) {
  const InstructionSet* set = find(instruction_set);
  if (set) chosen() = set, asked_for = true;
  return set;
}

bool covers(Dtype dtype) {
#ifdef __x86_64__
  static const bool has_tiles = __builtin_cpu_supports("amx-bf16");
  if (dtype == Dtype::bfloat16) return !has_tiles || asked_for;
#endif
  return dtype != Dtype::float16;
}

void forward(const Forward* layers, int64_t count, int threads) {
  const Kernels& k = *chosen().load()->kernels;
  double work = 0;
  for (const Forward* p = layers; p != layers + count; ++p)
    work += double(p->M) * double(p->N) * double(p->K);
  share(threads, work, [&](int rank, int size) {
    for (const Forward* p = layers; p != layers + count; ++p) {
      if (p != layers) {
#pragma omp barrier
      }
      const Block y = block(p->M, k.forward_rows, p->N, k.forward_columns, rank, size);
      k.forward(*p, y.rows, y.columns);
    }
  });
}

int64_t backward_workspace(const Backward& p) {
  const Kernels& k = *chosen().load()->kernels;
  if (in_pairs(k, p)) return rows_size(p) + ceil_div(p.N, k.pair_lanes) * k.pair_lanes * ceil_div(p.M, 2) * 4;
  return dz_is_grad_y(p) ? 0 : p.M * p.N * int64_t(sizeof(float));
}

namespace {

// One layer's backward pass on one of `size` threads.
void backward_layer(const Kernels& k, const Backward& p, int rank, int size) {
  const bool pairs = in_pairs(k, p), writes = (p.grad_x || p.grad_weight) && !dz_is_grad_y(p);
  Derivative written = {};
  if (writes && !pairs) written.full = static_cast<float*>(p.workspace);
  if (pairs && p.grad_x) written.rows = p.workspace;
  if (pairs && p.grad_weight) written.pairs = static_cast<char*>(p.workspace) + rows_size(p);
  const void* const dz = writes ? p.workspace : p.grad_y;
  constexpr int cache_line = 16;  // floats
  if (writes || p.grad_bias) k.differentiate(p, written, part(p.N, cache_line, rank, size));
  if (writes) {
#pragma omp barrier
  }
  if (p.grad_weight) {
    Product dw = {p.dtype, pairs, p.M, dz, 1, p.N, 0, p.x, p.ldx, p.grad_weight, p.K};
    if (pairs) {
      dw.a = written.pairs, dw.a_row = 2, dw.a_column = k.pair_lanes;
      dw.a_group = ceil_div(p.M, 2) * 2 * k.pair_lanes;
    }
    const Block b = block(p.N, k.product_rows, p.K, k.product_columns, rank, size);
    k.product(dw, b.rows, b.columns);
  }
  if (p.grad_x) {
    const Product dx = {p.dtype, pairs, p.N, dz, p.N, 1, p.N * k.pair_lanes, p.weight, p.ldw, p.grad_x, p.K};
    const Block b = block(p.M, k.product_rows, p.K, k.product_columns, rank, size);
    k.product(dx, b.rows, b.columns);
  }
}

}  // namespace

void backward(const Backward* layers, int64_t count, int threads) {
  const Kernels& k = *chosen().load()->kernels;
  double work = 0;
  for (const Backward* p = layers; p != layers + count; ++p) {
    const double products = double(p->grad_x != nullptr) + double(p->grad_weight != nullptr);
    work += double(p->M) * double(p->N) * (double(p->K) * products + 1);
  }
  share(threads, work, [&](int rank, int size) {
    for (const Backward* p = layers; p != layers + count; ++p) {
      if (p != layers) {
#pragma omp barrier
      }
      backward_layer(k, *p, rank, size);
    }
  });
}

}  // namespace fastmlp::cpu
