// The three matrix products on one thread, for one instruction set: two ways to multiply, and the choice.
//
//   y = x Wᵀ                    inner.h, or outer.h from a transposed copy of W
//   dx = dz W,  dW = dzᵀ x      outer.h

#include "outer.h"

// ---- y = g(x Wᵀ + b)

// Counts what each way costs, in multiply-adds of registers, to choose. Measured: along the sum a step costs a
// little more, for its loads, and adding up the lanes about 60 for as many sums as there are lanes; transposing an
// element of W costs 1.8, however many rows then use it, and packing one of x 0.8.
template <class T>
bool runs_along_sum(const Forward& p) {
  const double M = double(p.M), N = double(p.N),
               slots = double(ceil_div(p.K, in_pairs<T>(p.reduced) ? 2 : 1));
  const double inner = M * N * (1.05 * double(ceil_div(p.K, terms<T> * width)) + 60.0 / width);
  const double outer = slots * (1.06 * M * double(ceil_div(p.N, width)) + 1.8 * N + 0.8 * M);
  return inner <= outer;
}

template <class T>
void forward(const Forward& p, bool along_sum, Range rows, Range columns, Scratch& scratch) {
  if (along_sum) return forward_inner<terms<T>, T>(p, rows, columns);
  multiply<T>({.dtype = p.dtype,
               .reduced = p.reduced,
               .I = p.M,
               .P = p.K,
               .a = {.data = p.x, .ld = p.ldx},
               .b = {.data = p.weight, .ld = p.ldw, .transposed = true},
               .bias = p.bias,
               .activation = p.activation,
               .z = p.z,
               .c_dtype = p.dtype,
               .c = p.y,
               .ldc = p.N},
              rows, columns, scratch);
}

// out[i] = Σ_s partials[s * stride + i]
template <class T>
void add_up(const float* partials, int64_t count, int64_t stride, T* out, Range range) {
  for (int64_t i = range.begin; i < range.end; i += width) {
    V sum{};
    for (int64_t s = 0; s < count; ++s) sum += load(partials + s * stride + i, range.end - i);
    store(out + i, sum, range.end - i);
  }
}

#include "pointwise.h"
#include "softmax.h"

// ---- the table that backend.cpp chooses from

bool runs_along_sum(const Forward& p) {
  return p.dtype == Dtype::float32 ? runs_along_sum<float>(p) : runs_along_sum<bfloat16>(p);
}

void forward(const Forward& p, bool along_sum, Range rows, Range columns, void* scratch) {
  Scratch& own = *static_cast<Scratch*>(scratch);
  if (p.dtype == Dtype::float32) forward<float>(p, along_sum, rows, columns, own);
  else forward<bfloat16>(p, along_sum, rows, columns, own);
}

void multiply(const Product& p, Range rows, Range columns, void* scratch) {
  Scratch& own = *static_cast<Scratch*>(scratch);
  if (p.dtype == Dtype::float32) multiply<float>(p, rows, columns, own);
  else multiply<bfloat16>(p, rows, columns, own);
}

void add_up(const float* partials, int64_t count, int64_t stride, Dtype dtype, void* out, Range range) {
  if (dtype == Dtype::float32) add_up(partials, count, stride, static_cast<float*>(out), range);
  else add_up(partials, count, stride, static_cast<bfloat16*>(out), range);
}

constexpr Kernels kernels = {.forward_rows = inner_rows,
                             .forward_columns = inner_columns,
                             .product_rows = MR,
                             .product_columns = NR,
                             .runs_along_sum = runs_along_sum,
                             .forward = forward,
                             .multiply = multiply,
                             .add_up = add_up,
                             .update = update,
                             .cross_entropy = cross_entropy,
                             .pointwise_loss = pointwise_loss};
