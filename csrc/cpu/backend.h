// What an instruction set offers to the CPU backend: each product over a block of its output, on one thread.
#pragma once

#include <type_traits>
#include <utility>

#include "../kernels.h"

namespace fastmlp::cpu {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Indices begin <= i < end.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// A [I, P] of a product: element (i, p) is data[i * ld + p], or data[p * ld + i] where A is stored transposed. Where it
// is a layer's dz = dy · g', data is dy, and `saved` beside it is what g' is found from. dz is formed while it is
// packed, and nowhere else.
struct Left {
  const void* data;
  int64_t ld;
  bool transposed = false;
  Activation activation = {};
  const void* saved = nullptr;  // not read for the identity
};

// B [P, J]: element (p, j) is data[p * ld + j], or data[j * ld + p] where B is stored transposed; or the activation of
// it, found while it is packed.
struct Right {
  const void* data;
  int64_t ld;
  bool transposed = false;
  Activation activation = {};  // of one that is not transposed
};

// C = g(A B + bias)     A [I, P]   B [P, J]   C [I, J]
struct Product {
  Dtype dtype;   // of A, B and the bias
  bool reduced;  // float32 may be multiplied as bfloat16
  int64_t I, P;  // of the whole product, whose blocks must not differ in how they add up
  Left a;
  Right b;
  const void* bias = nullptr;  // [J], or null for none
  Activation activation = {};
  void* z = nullptr;  // [I, J], A B + bias, where it is wanted beside C
  Dtype c_dtype;      // dtype, or float32
  void* c;
  int64_t ldc;
  bool accumulate = false;  // C and sums are added to; C is float32, with no bias and no activation
  float* sums = nullptr;    // [I], Σ_p A[i][p], or null
  // Where given, A B is the gradient of a parameter [I, J], laid out as C with its state, which is changed by it, with
  // no bias or activation. C is then where sums stay until they are whole, and not touched where P is at most whole_sum.
  const Optimizer* optimizer = nullptr;
  Update update{};
};

struct Kernels {
  int forward_rows, forward_columns;  // the tiles: blocks of these multiples waste nothing
  int product_rows, product_columns;
  // Which of two ways suits a layer. They add up in different orders: to be asked of the layer as a whole, so that
  // neither the number of threads nor a block of rows decides.
  bool (*runs_along_sum)(const Forward&);
  // For rows and columns of the result. `scratch` is the thread's own, scratch_bytes of it, 64-byte aligned.
  void (*forward)(const Forward&, bool along_sum, Range rows, Range columns, void* scratch);
  void (*multiply)(const Product&, Range rows, Range columns, void* scratch);
  // out[i] = Σ_s partials[s * stride + i] for i in a range, s < count.
  void (*add_up)(const float* partials, int64_t count, int64_t stride, Dtype dtype, void* out, Range range);
  // One step for a range of the tensor's elements.
  void (*update)(const Optimizer&, const Update&, Range range);
  // Σ g² of a range of the gradient's elements, and those elements times a factor.
  double (*sum_of_squares)(Dtype, const Gradient&, Range range);
  void (*scale)(Dtype, const Gradient&, float factor, Range range);
  // The losses and gradients of some rows, whose targets are classes or ignored, times `scale`; the losses are
  // stored where they are not reduced, and without the scale. Returns the sum of the losses.
  double (*cross_entropy)(const CrossEntropy&, float scale, Range rows);
  // The sum of a range's losses, y and grad [M, N] as the target is; their gradients, times `scale`.
  double (*pointwise_loss)(Loss, const Pointwise&, const float* y, float scale, float* grad, Range range);
};

inline constexpr int64_t whole_sum = 256;

const Kernels& kernels();  // of the instruction set in use

inline constexpr int64_t scratch_bytes = 2400 << 10;

extern const Kernels avx512bf16_kernels, avx512_kernels, avx2_kernels, portable_kernels;

}  // namespace fastmlp::cpu
