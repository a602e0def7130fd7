// Forward and backward passes of a network, in one parallel region each.
#include "network.h"

#include <type_traits>

namespace fastmlp::cpu {
namespace {

// What passes from one layer to the next: two buffers in turn, one read while the other is written.
struct Between {
  char* buffers[2];
  char* written(int64_t layer) const { return buffers[layer % 2]; }
  char* read(int64_t layer) const { return buffers[(layer + 1) % 2]; }
};

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
  p.z = offset(p.z, rows.begin * p.N * size);
  return p;
}

Backward slice(const Backward* layers, int64_t index, int64_t count, Range rows, const Between& between) {
  Backward p = layers[index];
  const int64_t size = size_of(p.dtype);
  p.M = rows.size();
  p.grad_y = p.grad_y ? offset(p.grad_y, rows.begin * p.N * size) : between.read(index);
  p.saved = offset(p.saved, rows.begin * p.N * size);
  p.x = offset(p.x, rows.begin * p.ldx * size);
  p.grad_x = index + 1 < count ? between.written(index) : offset(p.grad_x, rows.begin * p.K * size);
  return p;
}

}  // namespace

void grad_input(const Kernels& k, const Backward& p, int rank, int size) {
  const Product dx = {.dtype = p.dtype,
                      .reduced = p.reduced,
                      .I = p.M,
                      .P = p.N,
                      .a = {p.grad_y, p.N, false, p.activation, p.saved},
                      .b = {p.weight, p.ldw},
                      .c_dtype = p.dtype,
                      .c = p.grad_x,
                      .ldc = p.K};
  const Block b = block(p.M, k.product_rows, p.K, k.product_columns, rank, size);
  k.multiply(dx, b.rows, b.columns, scratch());
}

Range grad_weight(const Kernels& k, const Backward& p, const Sums& sums, bool accumulate,
                  const Trained* trained, int rank, int size) {
  const bool multiplies = (p.grad_weight || trained) && p.K > 0;
  const Block b = multiplies ? block(p.N, k.product_rows, p.K, k.product_columns, rank, size)
                             : Block{part(p.N, k.product_rows, rank, size), {0, 0}};
  const bool adds_up =
      p.grad_bias && b.columns.end == (multiplies ? p.K : 0);  // one thread alone a row of dzᵀ
  const Product dw = {.dtype = p.dtype,
                      .reduced = p.reduced,
                      .I = p.N,
                      .P = p.M,
                      .a = {p.grad_y, p.N, true, p.activation, p.saved},
                      .b = {p.x, p.ldx, false, p.x_activation},
                      .c_dtype = sums.weight ? Dtype::float32 : p.dtype,
                      .c = sums.weight ? sums.weight : p.grad_weight,
                      .ldc = p.K,
                      .accumulate = accumulate,
                      .sums = adds_up ? sums.bias : nullptr,
                      .sgd = trained ? trained->sgd : nullptr,
                      .param = trained ? trained->param : nullptr,
                      .momentum = trained ? trained->momentum : nullptr};
  k.multiply(dw, b.rows, b.columns, scratch());
  return adds_up ? b.rows : Range{0, 0};
}

namespace {

void backward_layer(const Kernels& k, const Backward& p, const Sums& sums, bool accumulate, int rank,
                    int size) {
  if (p.grad_weight || p.grad_bias) grad_weight(k, p, sums, accumulate, nullptr, rank, size);
  if (p.grad_x) grad_input(k, p, rank, size);
}

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
  const Kernels& k = kernels();
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
      if (i > 0) wait(size);
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
  const Kernels& k = kernels();
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
        if (i > 0) wait(size);
        backward_layer(k, slice(layers, i, count, {0, M}, between), sums, false, rank, size);
      });
    }
    if (partials.stride == 0) return;
    wait(size);
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
