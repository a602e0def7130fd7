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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs work(rank, size) on `size` threads at once, or on this one where there is too little of it.
template <class Work>
void share(int threads, double multiply_adds, Work work) {
  if (threads <= 1 || multiply_adds < FASTMLP_LEAST_PARALLEL_WORK || omp_in_parallel() || forked)
    return work(0, 1);
#pragma omp parallel
  work(omp_get_thread_num(), omp_get_num_threads());
}

// The part of 0 <= i < size that belongs to `rank` of `parts`, in whole tiles.
Range part(int64_t size, int tile, int rank, int parts) {
  const int64_t tiles = ceil_div(size, tile);
  const auto bound = [&](int64_t r) { return std::min(size, tiles * r / parts * tile); };
  return {bound(rank), bound(rank + 1)};
}

// Each thread's memory for packed blocks. Nothing in it outlives a call.
void* scratch() {
  alignas(64) static thread_local char memory[scratch_bytes];
  return memory;
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

// ---- how a network passes through the threads
//
// By layers: all threads share each layer, in blocks of its result, and wait for one another before the next.
// By rows: each thread takes rows of the batch through all layers, a block at a time. What passes from layer to
// layer then stays in its cache, and it waits for nobody; but each block packs the weights again, and weight
// gradients are added up by segments of the batch, in as many buffers.
// The choice, the blocks and the segments depend on the shapes alone and not on the number of threads.

constexpr int64_t block_rows = 256;

template <class Layer>
bool goes_by_rows(const Layer* layers, int64_t count) {
  constexpr int64_t most_weights = 1 << 17, least_rows = 1024;
  int64_t weights = 0;
  for (const Layer* p = layers; p != layers + count; ++p) weights += p->N * p->K;
  return layers->M >= least_rows && weights <= most_weights;
}

int64_t segments(int64_t M) { return std::min<int64_t>(16, M / 128); }

int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// What passes from one layer to the next: two buffers in turn, one read while the other is written.
struct Between {
  char* buffers[2];
  char* written(int64_t layer) const { return buffers[layer % 2]; }
  char* read(int64_t layer) const { return buffers[(layer + 1) % 2]; }
};

constexpr int64_t cache_line = 64;

// Bytes of one buffer between layers, in whole cache lines.
int64_t between_bytes(Dtype dtype, int64_t rows, int64_t widest) {
  return ceil_div(rows * widest * size_of(dtype), cache_line) * cache_line;
}

template <class T>
T* offset(T* pointer, int64_t bytes) {
  using Char = std::conditional_t<std::is_const_v<T>, const char, char>;
  return pointer ? static_cast<Char*>(pointer) + bytes : nullptr;
}

// The layer for some rows of the batch, with nothing left open.
Forward slice(const Forward* layers, int64_t index, Range rows, const Between& between) {
  Forward p = layers[index];
  const int64_t size = size_of(p.dtype);
  p.M = rows.size();
  p.x = p.x ? offset(p.x, rows.begin * p.ldx * size) : between.read(index);
  p.y = p.y ? offset(p.y, rows.begin * p.N * size) : between.written(index);
  return p;
}

Backward slice(const Backward* layers, int64_t index, int64_t count, Range rows, const Between& between) {
  Backward p = layers[index];
  const int64_t size = size_of(p.dtype);
  p.M = rows.size();
  p.grad_y = p.grad_y ? offset(p.grad_y, rows.begin * p.N * size) : between.read(index);
  p.y = offset(p.y, rows.begin * p.N * size);
  p.x = offset(p.x, rows.begin * p.ldx * size);
  p.grad_x = index + 1 < count ? between.written(index) : offset(p.grad_x, rows.begin * p.K * size);
  return p;
}

// Where the float32 sums of a layer's weight and bias gradients are: the gradients themselves, or partial sums.
struct Sums {
  float *weight, *bias;
};

// One layer's backward pass for the part of it that belongs to `rank` of `size`.
void backward_layer(const Kernels& k, const Backward& p, const Sums& sums, bool accumulate, int rank,
                    int size) {
  const Left dz = {p.grad_y, p.y, p.activation, p.N, false};
  if (p.grad_weight || p.grad_bias) {
    Left dz_transposed = dz;
    dz_transposed.transposed = true;
    const bool partial = sums.weight, multiplies = p.grad_weight && p.K > 0;
    const Block b = multiplies ? block(p.N, k.product_rows, p.K, k.product_columns, rank, size)
                               : Block{part(p.N, k.product_rows, rank, size), {0, 0}};
    const bool is_last = b.columns.end == (multiplies ? p.K : 0);  // one thread alone adds up a row of dzᵀ
    const Product dw = {.dtype = p.dtype,
                        .reduced = p.reduced,
                        .I = p.N,
                        .P = p.M,
                        .a = dz_transposed,
                        .b = {p.x, p.ldx, false},
                        .bias = nullptr,
                        .activation = Activation::identity,
                        .c_dtype = partial ? Dtype::float32 : p.dtype,
                        .c = partial ? sums.weight : p.grad_weight,
                        .ldc = p.K,
                        .accumulate = accumulate,
                        .sums = p.grad_bias && is_last ? sums.bias : nullptr};
    k.multiply(dw, b.rows, b.columns, scratch());
  }
  if (p.grad_x) {
    const Product dx = {.dtype = p.dtype,
                        .reduced = p.reduced,
                        .I = p.M,
                        .P = p.N,
                        .a = dz,
                        .b = {p.weight, p.ldw, false},
                        .bias = nullptr,
                        .activation = Activation::identity,
                        .c_dtype = p.dtype,
                        .c = p.grad_x,
                        .ldc = p.K,
                        .accumulate = false,
                        .sums = nullptr};
    const Block b = block(p.M, k.product_rows, p.K, k.product_columns, rank, size);
    k.multiply(dx, b.rows, b.columns, scratch());
  }
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

namespace {

template <class Layer>
double multiply_adds(const Layer* layers, int64_t count, double products) {
  double sum = 0;
  for (const Layer* p = layers; p != layers + count; ++p)
    sum += products * double(p->M) * double(p->N) * double(p->K + 1);
  return sum;
}

// The widest of the results that only the next layer reads.
int64_t widest(const Forward* layers, int64_t count) {
  int64_t most = 0;
  for (const Forward* p = layers; p != layers + count; ++p)
    if (!p->y) most = std::max(most, p->N);
  return most;
}
int64_t widest(const Backward* layers, int64_t count) {
  int64_t most = 0;
  for (int64_t i = 0; i + 1 < count; ++i) most = std::max(most, layers[i].K);
  return most;
}

// The buffers between layers: for a block of each thread's, or for the whole batch. A thread's begin at
// workspace + rank * of_thread.
template <class Layer>
struct Workspace {
  int64_t buffer, of_thread, all;
  Workspace(const Layer* layers, int64_t count, int threads) {
    const bool by_rows = goes_by_rows(layers, count);
    buffer = between_bytes(layers->dtype, by_rows ? block_rows : layers->M, widest(layers, count));
    of_thread = by_rows ? 2 * buffer : 0;
    all = 2 * buffer * (by_rows ? threads : 1);
  }
  Between between(void* workspace, int rank) const {
    char* const own = static_cast<char*>(workspace) + rank * of_thread;
    return {{own, own + buffer}};
  }
};

}  // namespace

int64_t forward_workspace(const Forward* layers, int64_t count, int threads) {
  return Workspace<Forward>(layers, count, threads).all;
}

void forward(const Forward* layers, int64_t count, void* workspace, int threads) {
  const Kernels& k = *chosen().load()->kernels;
  const Workspace<Forward> space(layers, count, threads);
  const bool by_rows = goes_by_rows(layers, count);
  const int64_t M = layers->M;
  share(threads, multiply_adds(layers, count, 1), [&](int rank, int size) {
    const Between between = space.between(workspace, rank);
    if (by_rows) {
      const Range rows = part(M, k.product_rows, rank, size);
      for (int64_t first = rows.begin; first < rows.end; first += block_rows)
        for (int64_t i = 0; i < count; ++i) {
          const Forward p = slice(layers, i, {first, std::min(first + block_rows, rows.end)}, between);
          k.forward(p, k.runs_along_sum(layers[i]), {0, p.M}, {0, p.N}, scratch());
        }
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      if (i > 0) {
#pragma omp barrier
      }
      const Forward p = slice(layers, i, {0, M}, between);
      const Block y = block(p.M, k.forward_rows, p.N, k.forward_columns, rank, size);
      k.forward(p, k.runs_along_sum(p), y.rows, y.columns, scratch());
    }
  });
}

namespace {

// The partial sums of the gradients of weights and biases, one after the other as the layers are. By layers:
// none where they are float32, which the gradients are themselves; of bfloat16 the biases' alone.
struct Partials {
  bool by_rows;
  int64_t stride = 0;  // floats of a segment

  Partials(const Backward* layers, int64_t count) : by_rows(goes_by_rows(layers, count)) {
    for (const Backward* p = layers; p != layers + count; ++p) stride += weight_size(*p) + bias_size(*p);
  }
  int64_t weight_size(const Backward& p) const { return by_rows && p.grad_weight ? rounded(p.N * p.K) : 0; }
  int64_t bias_size(const Backward& p) const {
    return p.grad_bias && (by_rows || p.dtype != Dtype::float32) ? rounded(p.N) : 0;
  }
  static int64_t rounded(int64_t floats) { return ceil_div(floats * 4, cache_line) * cache_line / 4; }

  // Calls f(layer, index, its sums in the segment that begins at `segment`).
  template <class F>
  void each(const Backward* layers, int64_t count, float* segment, F f) const {
    for (int64_t i = 0; i < count; ++i) {
      const Backward& p = layers[i];
      Sums sums = {nullptr, static_cast<float*>(p.grad_bias)};
      if (weight_size(p)) sums.weight = segment, segment += weight_size(p);
      if (bias_size(p)) sums.bias = segment, segment += bias_size(p);
      f(i, sums);
    }
  }
};

}  // namespace

int64_t backward_workspace(const Backward* layers, int64_t count, int threads) {
  const Partials partials(layers, count);
  const int64_t parts = partials.by_rows ? segments(layers->M) : 1;
  return Workspace<Backward>(layers, count, threads).all + parts * partials.stride * int64_t(sizeof(float));
}

void backward(const Backward* layers, int64_t count, void* workspace, int threads) {
  const Kernels& k = *chosen().load()->kernels;
  const Workspace<Backward> space(layers, count, threads);
  const Partials partials(layers, count);
  float* const sums_begin = reinterpret_cast<float*>(static_cast<char*>(workspace) + space.all);
  const int64_t M = layers->M, parts = partials.by_rows ? segments(M) : 1;
  share(threads, multiply_adds(layers, count, 2), [&](int rank, int size) {
    const Between between = space.between(workspace, rank);
    if (partials.by_rows) {
      for (int64_t s = parts * rank / size; s < parts * (rank + 1) / size; ++s) {
        const Range rows = part(M, 16, int(s), int(parts));
        for (int64_t first = rows.begin; first < rows.end; first += block_rows)
          partials.each(layers, count, sums_begin + s * partials.stride, [&](int64_t i, const Sums& sums) {
            const Range some = {first, std::min(first + block_rows, rows.end)};
            backward_layer(k, slice(layers, i, count, some, between), sums, first > rows.begin, 0, 1);
          });
      }
    } else {
      partials.each(layers, count, sums_begin, [&](int64_t i, const Sums& sums) {
        if (i > 0) {
#pragma omp barrier
        }
        backward_layer(k, slice(layers, i, count, {0, M}, between), sums, false, rank, size);
      });
    }
    if (partials.stride == 0) return;
#pragma omp barrier
    partials.each(layers, count, sums_begin, [&](int64_t i, const Sums& sums) {
      const Backward& p = layers[i];
      const auto finish = [&](const float* from, void* to, int64_t length) {
        k.add_up(from, parts, partials.stride, p.dtype, to, part(length, 64, rank, size));
      };
      if (partials.weight_size(p)) finish(sums.weight, p.grad_weight, p.N * p.K);
      if (partials.bias_size(p)) finish(sums.bias, p.grad_bias, p.N);
    });
  });
}

}  // namespace fastmlp::cpu
