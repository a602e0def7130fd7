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

// C = A B for row-major B and C and an A of any strides:
//   C[i][j] = Σ_p A[i * a_row + p * a_column] B[p * ldb + j]      A [I, P]   B [P, J]   C [I, J]
struct Product {
  Dtype dtype;  // of B and C; A is float32
  int64_t P;
  const float* a;
  int64_t a_row, a_column;
  const void* b;
  int64_t ldb;
  void* c;
  int64_t ldc;
};

struct Kernels {
  int forward_rows, forward_columns;  // the tiles: blocks of these multiples waste nothing
  int product_rows, product_columns;
  // y = g(x Wᵀ + b) for rows and columns of y.
  void (*forward)(const Forward&, Range rows, Range columns);
  // dz = dy · g'(y), as float32 [M, N] unless `dz` is null, and db unless null, for columns of dz.
  void (*differentiate)(const Backward&, float* dz, Range columns);
  // C = A B for rows and columns of C.
  void (*product)(const Product&, Range rows, Range columns);
};

extern const Kernels avx512_kernels, avx2_kernels, portable_kernels;

}  // namespace fastmlp::cpu
