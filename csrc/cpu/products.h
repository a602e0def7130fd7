// The three matrix products on one thread, for one instruction set: two ways to multiply, and the choice.
//
//   y = x Wᵀ                    both operands are contiguous along the sum. Registers run along K, on the
//                               operands as they are, and are added up across their lanes once, at the end;
//                               or as the other two, from a transposed copy of W
//   dx = dz W,  dW = dzᵀ x      the result's rows are contiguous: registers run along them, and dz is broadcast
//
// The blocks and their names are those of BLIS (Van Zee and van de Geijn, 2015).

#include "packing.h"
#include "update.h"

// y = g(sums + b) for m rows and n columns; y may be where the sums are.
template <Activation g, class T, class C>
void finish(const float* sums, int64_t ld, const T* bias, C* y, int64_t ldy, int64_t m, int64_t n) {
  for (int64_t j = 0; j < n; j += width) {
    const V b = bias ? load(bias + j, n - j) : V{};
    for (int64_t i = 0; i < m; ++i)
      store(y + i * ldy + j, activate<g>(load(sums + i * ld + j, n - j) + b), n - j);
  }
}

// W and its momentum, changed by m rows and n columns of its gradient's sums.
void descend(const Sgd& sgd, const float* sums, int64_t ld, float* w, float* momentum, int64_t ldw, int64_t m,
             int64_t n) {
  for (int64_t i = 0; i < m; ++i, w += ldw, sums += ld) {
    if (momentum) update<true>(sgd, w, sums, momentum + i * ldw, {0, n});
    else update<false>(sgd, w, sums, momentum, {0, n});
  }
}

// ---- C = A Bᵀ, with registers along the sum

// Adds pairs of lanes of a and b: the sums of a's pairs of `step`-wide pieces, then those of b's.
template <int step, int... lane>
FASTMLP_INLINE V add_pieces(V a, V b, std::integer_sequence<int, lane...>) {
  constexpr auto source = [](int i) { return i / step * 2 * step + i % step; };
  return __builtin_shufflevector(a, b, source(lane)...) +
         __builtin_shufflevector(a, b, source(lane) + step...);
}

// Lane i of the result is the sum over the lanes of v[i], for i < n <= width: a tree, so that the order of
// the additions does not depend on n.
template <int n, int step = width / 2>
FASTMLP_INLINE V sum_lanes(const V* v) {
  constexpr int pairs = (n + 1) / 2;
  V sums[pairs];
#pragma GCC unroll 16
  for (int i = 0; i < pairs; ++i)
    sums[i] = add_pieces<step>(v[2 * i], 2 * i + 1 < n ? v[2 * i + 1] : V{},
                               std::make_integer_sequence<int, width>{});
  if constexpr (step > 1) return sum_lanes<pairs, step / 2>(sums);
  else return sums[0];
}

// sum[i][j] += x[i][k] w[j][k] for a register of k, or for the first n of them. Bound by FMA: loads rows +
// columns registers for rows * columns FMAs.
template <int terms, int rows, int columns, class T>
FASTMLP_INLINE void inner_step(V (&sum)[rows][columns], const T* x, int64_t ldx, const T* w, int64_t ldw,
                               int64_t n) {
  V b[columns];
#pragma GCC unroll 16
  for (int j = 0; j < columns; ++j) b[j] = slots<terms>(w + j * ldw, n);
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    const V a = slots<terms>(x + i * ldx, n);
#pragma GCC unroll 16
    for (int j = 0; j < columns; ++j) sum[i][j] = multiply_add<terms>(sum[i][j], a, b[j]);
  }
}

// sums[i][j] = Σ_k x[i][k] w[j][k] for a tile of rows x columns. Writes whole registers: what lies beyond the tile,
// the next one overwrites.
template <int rows, int columns, int terms, class T>
void inner_tile(int64_t K, const T* x, int64_t ldx, const T* w, int64_t ldw, float* sums, int64_t ld) {
  constexpr int step = terms * width;
  V sum[rows][columns] = {};
  int64_t k = 0;
  for (; k + step <= K; k += step) inner_step<terms>(sum, x + k, ldx, w + k, ldw, step);
  if (k < K) inner_step<terms>(sum, x + k, ldx, w + k, ldw, K - k);
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) store(sums + i * ld, sum_lanes<columns>(sum[i]));
}

// The columns of a tile of so many rows: one or two rows alone are bound by the bandwidth of W, and want many
// streams of it and enough sums to hide the latency of an FMA.
constexpr int inner_columns_of(int rows) {
  const int sums = inner_rows * inner_columns;
  return rows == 1   ? int(smaller(8, smaller(width, sums)))
         : rows == 2 ? int(smaller(width, sums / 2))
                     : inner_columns;
}

// A few rows of x stay in the first-level cache while W streams past them from the second, a panel at a time,
// which stays there for all rows of x. The sums of the rows over the panel are then finished.
template <Activation g, int terms, class T>
void forward_inner(const Forward& p, Range rows, Range columns) {
  const T* x = static_cast<const T*>(p.x);
  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);
  constexpr int most = 8 * inner_rows, wide = 48, ld = wide + width;
  constexpr int64_t resident = 20 << 10;  // bytes
  const int64_t tiles = resident / (inner_rows * (p.K + 1) * int64_t(sizeof(T)));
  const int64_t few = inner_rows * larger(1, smaller(tiles, most / inner_rows));
  alignas(64) float sums[most * ld];
  for (int64_t n = columns.begin; n < columns.end; n += wide) {
    const int64_t n_count = smaller(wide, columns.end - n);
    for (int64_t m = rows.begin; m < rows.end; m += few) {
      const int64_t m_count = smaller(few, rows.end - m);
      for (int64_t i = 0; i < m_count; i += inner_rows)
        with_count<inner_rows>(smaller(inner_rows, m_count - i), [&](auto m_tile) {
          constexpr int tile_rows = decltype(m_tile)::value, step = inner_columns_of(tile_rows);
          for (int64_t j = 0; j < n_count; j += step)
            with_count<step>(smaller(step, n_count - j), [&](auto n_tile) {
              inner_tile<tile_rows, decltype(n_tile)::value, terms>(
                  p.K, x + (m + i) * p.ldx, p.ldx, weight + (n + j) * p.ldw, p.ldw, sums + i * ld + j, ld);
            });
        });
      finish<g>(sums, ld, bias ? bias + n : nullptr, static_cast<T*>(p.y) + m * p.N + n, p.N, m_count,
                n_count);
    }
  }
}

// ---- C = A B, with registers along the rows of C and B

// A tile of rows x vectors registers of C, from slots of A (element (i, p) at i * row + p * step) and rows of
// B; of each row's last register only `last` lanes are stored, and loaded where B is not a panel. Bound by
// FMA: a step loads `vectors` registers and broadcasts `rows` slots for rows * vectors FMAs.
template <int rows, int vectors, int terms, int row, int step, bool packed, class B>
void outer_tile(int64_t P, const float* a, const B* b, int64_t ldb, float* c, int64_t ldc, int64_t last,
                bool accumulate) {
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) __builtin_prefetch(c + i * ldc + (v + 1) * width - 1, 1);
  V sum[rows][vectors] = {};
  for (; P > 0; --P, a += step, b += packed ? NR : ldb) {
    V right[vectors];
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v)
      right[v] = packed || v < vectors - 1 ? load(b + v * width) : load(b + v * width, last);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const V left = a[i * row] - V{};
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) sum[i][v] = multiply_add<terms>(sum[i][v], left, right[v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i, c += ldc) {
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      float* at = c + v * width;
      const int64_t n = v == vectors - 1 ? last : width;
      store(at, accumulate ? sum[i][v] + load(at, n) : sum[i][v], n);
    }
  }
}

// The registers in a row of a tile of so many rows: a panel's; where B is read in place, as many as there are
// sums for, since few rows are bound by the bandwidth of B.
template <bool packed>
constexpr int vectors_of(int rows) {
  return packed ? outer_vectors : int(smaller(8, MR * outer_vectors / rows));
}

// m <= MR rows of a group of A times n columns of B.
template <int terms, int row, int step, bool packed, class B>
FASTMLP_INLINE void outer_row(int64_t m, int64_t n, int64_t P, const float* a, const B* b, int64_t ldb,
                              float* c, int64_t ldc, bool accumulate) {
  with_count<MR>(m, [&](auto m_tile) {
    constexpr int rows = decltype(m_tile)::value, most = vectors_of<packed>(rows);
    for (int64_t j = 0; j < n; j += most * width) {
      const int64_t count = smaller(most * width, n - j), vectors = ceil_div(count, width);
      with_count<most>(vectors, [&](auto n_tile) {
        outer_tile<rows, decltype(n_tile)::value, terms, row, step, packed>(
            P, a, b + j, ldb, c + j, ldc, count - (vectors - 1) * width, accumulate);
      });
    }
  });
}

struct Scratch {
  alignas(64) float a[MC / MR * group];
  alignas(64) float b[NC * KC];
  alignas(64) float c[MC * NC];
};
static_assert(sizeof(Scratch) <= scratch_bytes);

// Asks for the part of a parameter that a tile is about to change.
void fetch_rows(const Product& p, int64_t i, int64_t j, int64_t m, int64_t n) {
  constexpr int64_t line = 16;
  for (int64_t at = i * p.ldc + j; m > 0; --m, at += p.ldc)
    for (int64_t column = 0; column < n; column += line) {
      __builtin_prefetch(p.param + at + column, 1);
      if (p.momentum) __builtin_prefetch(p.momentum + at + column, 1);
    }
}

// C = g(A B + bias), or what Product says of SGD. A block of B is packed, then block after block of A that meets it.
// A panel of B's stays in L1 while A's block streams past it from L2; or all panels in L2, if they have the room, and
// C is written row by row. float32 is added up in C itself; bfloat16 in
// `scratch`, a block of C at a time; and where the sum is whole at once, what is to be done with it finds it in L1.
// Where rows are few, B is read in place.
template <int terms, bool packed, class T>
void multiply(const Product& p, Range rows, Range columns, Scratch& scratch) {
  const T* const a = static_cast<const T*>(p.a.data);
  const T* const y = p.a.activation == Activation::identity ? a : static_cast<const T*>(p.a.y);
  const T* const b = static_cast<const T*>(p.b.data);
  const T* const bias = static_cast<const T*>(p.bias);
  const int64_t chunks = larger(1, ceil_div(p.P, KC * terms));
  const int64_t deep = ceil_div(ceil_div(p.P, chunks), terms) * terms;
  const bool is_float = p.c_dtype == Dtype::float32;
  const bool at_once = chunks == 1 && (p.sgd || !is_float), in_place = is_float && !at_once;
  const bool finishes = p.activation != Activation::identity || bias || p.sgd || !in_place;
  constexpr int64_t resident = 1 << 16;  // slots of B
  const int64_t row_step = in_place || at_once ? larger(1, rows.size()) : MC;

  const auto pack_left = [&](int64_t i, int64_t m, int64_t k, int64_t depth, float* sums) {
    with_activation(p.a.activation, [&](auto g) {
      constexpr Activation activation = decltype(g)::value;
      const int64_t at = p.a.transposed ? k * p.a.ld + i : i * p.a.ld + k;
      if (p.a.transposed)
        pack_columns<activation, terms>(scratch.a, a + at, y + at, p.a.ld, m, depth, sums,
                                        p.accumulate || k > 0);
      else pack_rows<activation, terms>(scratch.a, a + at, y + at, p.a.ld, m, depth);
    });
  };
  const auto finished = [&](const float* sums, int64_t ld, int64_t i, int64_t j, int64_t m, int64_t n) {
    const int64_t at = i * p.ldc + j;
    if (p.sgd) {
      float* const momentum = p.momentum ? p.momentum + at : nullptr;
      return descend(*p.sgd, sums, ld, p.param + at, momentum, p.ldc, m, n);
    }
    with_activation(p.activation, [&](auto g) {
      const T* const from = bias ? bias + j : nullptr;
      if (is_float) finish<decltype(g)::value>(sums, ld, from, static_cast<float*>(p.c) + at, p.ldc, m, n);
      else finish<decltype(g)::value>(sums, ld, from, static_cast<T*>(p.c) + at, p.ldc, m, n);
    });
  };

  for (int64_t first = rows.begin; first < rows.end; first += row_step) {
    int64_t j = columns.begin;
    do {  // once too where there are no columns: for the sums
      const int64_t n = smaller(NC, columns.end - j);
      int64_t k = 0;
      do {
        const int64_t depth = smaller(deep, p.P - k), P = ceil_div(depth, terms);
        if (packed && p.b.transposed) pack_transposed<terms>(scratch.b, b + j * p.b.ld + k, p.b.ld, depth, n);
        else if (packed) pack_panels<terms>(scratch.b, b + k * p.b.ld + j, p.b.ld, depth, n);
        const bool adds = p.accumulate || k > 0, is_last = k + depth >= p.P;
        for (int64_t i = first; i < smaller(first + row_step, rows.end); i += MC) {
          const int64_t m = smaller(MC, smaller(first + row_step, rows.end) - i);
          pack_left(i, m, k, depth, p.sums && j == columns.begin ? p.sums + i : nullptr);
          float* const c = in_place ? static_cast<float*>(p.c) + i * p.ldc + j : scratch.c;
          const int64_t ldc = in_place ? p.ldc : NC;
          const auto tile = [&](auto layout, int64_t r, int64_t column, int64_t width, const auto* right) {
            constexpr int row = decltype(layout)::value ? 1 : KC, step = decltype(layout)::value ? MR : 1;
            const int64_t count = smaller(MR, m - r);
            float* const sums = at_once ? c : c + r * ldc + column;
            if (at_once && p.sgd) fetch_rows(p, i + r, j + column, count, width);
            outer_row<terms, row, step, packed>(count, width, P, scratch.a + r / MR * group, right, p.b.ld,
                                                sums, ldc, adds);
            if (is_last && finishes) finished(sums, ldc, i + r, j + column, count, width);
          };
          const auto both = [&](auto layout) {
            const auto at = [&](int64_t r, int64_t column) {
              tile(layout, r, column, smaller(NR, n - column), scratch.b + column / NR * panel);
            };
            if constexpr (!packed)
              for (int64_t r = 0; r < m; r += MR) tile(layout, r, 0, n, b + k * p.b.ld + j);
            else if (P * n <= resident)
              for (int64_t r = 0; r < m; r += MR)
                for (int64_t column = 0; column < n; column += NR) at(r, column);
            else
              for (int64_t column = 0; column < n; column += NR)
                for (int64_t r = 0; r < m; r += MR) at(r, column);
          };
          if (p.a.transposed) both(std::true_type{});
          else both(std::false_type{});
        }
        k += depth;
      } while (k < p.P);
      j += NC;
    } while (j < columns.end);
  }
}

// From this many rows of C on, a packed block of B is used often enough to pay for the copy.
constexpr int64_t least_packed_rows = 3 * MR;

// Whether the product is of pairs of bfloat16.
template <class T>
bool in_pairs(bool reduced) {
  return multiplies_pairs && (std::is_same_v<T, bfloat16> || reduced);
}

template <class T>
void multiply(const Product& p, Range rows, Range columns, Scratch& scratch) {
  if (!p.b.transposed && p.I < least_packed_rows) return multiply<1, false, T>(p, rows, columns, scratch);
  if constexpr (multiplies_pairs) {
    if (in_pairs<T>(p.reduced)) return multiply<2, true, T>(p, rows, columns, scratch);
  }
  if constexpr (terms<T> == 1) multiply<1, true, T>(p, rows, columns, scratch);
}

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
  if (along_sum)
    return with_activation(p.activation,
                           [&](auto g) { forward_inner<decltype(g)::value, terms<T>, T>(p, rows, columns); });
  const Left x = {p.x, nullptr, Activation::identity, p.ldx, false};
  const Right weight = {p.weight, p.ldw, true};
  multiply<T>(
      {p.dtype, p.reduced, p.M, p.K, x, weight, p.bias, p.activation, p.dtype, p.y, p.N, false, nullptr},
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

constexpr Kernels kernels = {inner_rows,    inner_columns, MR,     NR,     runs_along_sum,
                             forward,       multiply,      add_up, update, cross_entropy,
                             pointwise_loss};
