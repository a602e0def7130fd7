// What an instruction set offers to the CPU backend: each product over a block of its output, on one thread.
#pragma once

#include <type_traits>
#include <utility>

#include "../kernels.h"

namespace fastmlp::cpu {

// Indices begin <= i < end.
struct Range {
  int64_t begin, end;
};

// dz = dy · g'(y) in the forms that products take; those that are null are not written.
struct Derivative {
  float* full;  // float32 [M, N]
  // bfloat16 for processors that multiply it in pairs along the sum: for dx [M, N]; for dW [N / lanes,
  // M / 2, lanes, 2], both quotients rounded up.
  void *rows, *pairs;
};

// C = A B for row-major B and C and an A of any strides:
//   C[i][j] = Σ_p A[i * a_row + p * a_column] B[p * ldb + j]      A [I, P]   B [P, J]   C [I, J]
struct Product {
  Dtype dtype;    // of B and C
  bool in_pairs;  // A is bfloat16, with the odd p next to the even ones; else float32
  int64_t P;
  const void* a;
  int64_t a_row, a_column, a_group;  // i = lanes begins at a_group, where A is in pairs
  const void* b;
  int64_t ldb;
  void* c;
  int64_t ldc;
};

struct Kernels {
  int forward_rows, forward_columns;  // the tiles: blocks of these multiples waste nothing
  int product_rows, product_columns;
  int pair_lanes;  // of a register, where products of bfloat16 take pairs; else 0
  // y = g(x Wᵀ + b) for rows and columns of y.
  void (*forward)(const Forward&, Range rows, Range columns);
  // dz, and db unless null, for columns of dz.
  void (*differentiate)(const Backward&, const Derivative& dz, Range columns);
  // C = A B for rows and columns of C.
  void (*product)(const Product&, Range rows, Range columns);
};

extern const Kernels avx512bf16_kernels, avx512_kernels, avx2_kernels, portable_kernels;

}  // namespace fastmlp::cpu
