// The three matrix products on one thread, and the element-wise step between them, for one instruction set.
//
// Included by avx512bf16.cpp, avx512.cpp, avx2.cpp and portable.cpp, each inside its own namespace and after it
// has defined
//
//   V                            a register of float32
//   Halves                       half a register of uint16_t: as many bfloat16
//   load_some<R>(p, n)           an R of the first n elements at p; others are not read, their lanes are 0
//   store_some(p, r, n)          the first n lanes of r to p
//   inner_rows x inner_columns   the register tile of x Wᵀ, in outputs
//   outer_rows x outer_vectors   the register tile of A B, in outputs and registers
//   multiplies_pairs             whether the processor multiplies bfloat16, and there are
//   add_pairs(sum, a, b)         to each lane of sum, the products of the lane's two bfloat16 in a and in b
//   round(v)                     v as bfloat16
//
// PyTorch's layout suits all three as it is. In y = x Wᵀ both operands are contiguous along the sum: registers
// run along K and are added up across their lanes once, at the end. In dx = dz W and dW = dzᵀ x the output's
// rows are contiguous: registers run along them, and dz is broadcast. A panel is copied only where many rows
// share the copy: of W, transposed, where sums are short, so that y too has its registers along its rows; and
// of the other two's right operand.

constexpr int width = sizeof(V) / sizeof(float);
using Bits = typename Integer<V>::type;

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- loads and stores: float32 as it is; bfloat16 widened on the way in, rounded to nearest even on the way out

struct bfloat16 {
  uint16_t bits;
};

// How many terms of a sum a lane takes at once.
template <class T>
constexpr int terms = multiplies_pairs && std::is_same_v<T, bfloat16> ? 2 : 1;

// A lane for each pair (first[i], second[i]), the first in its low half.
template <int... lane>
FASTMLP_INLINE V paired(Halves first, Halves second, std::integer_sequence<int, lane...>) {
  return bit_cast<V>(__builtin_shufflevector(first, second, (lane / 2 + lane % 2 * width)...));
}
FASTMLP_INLINE V paired(Halves first, Halves second) {
  return paired(first, second, std::make_integer_sequence<int, 2 * width>{});
}

FASTMLP_INLINE V widen(Halves h) { return paired(Halves{}, h); }

template <class R>
FASTMLP_INLINE Halves narrow(R v) {
  if constexpr (multiplies_pairs) return round(v);
  Bits bits = bit_cast<Bits>(v);
  bits = bits + 0x7fff + ((bits >> 16) & 1);
  bits = v != v ? Bits{} + 0x7fc00000 : bits;
  return __builtin_convertvector(bits >> 16, Halves);
}

template <class R, class T>
FASTMLP_INLINE R load_all(const T* p) {
  R r;
  __builtin_memcpy(&r, p, sizeof(r));
  return r;
}

FASTMLP_INLINE V load(const float* p) { return load_all<V>(p); }
FASTMLP_INLINE V load(const bfloat16* p) { return widen(load_all<Halves>(p)); }
FASTMLP_INLINE void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof(v)); }
FASTMLP_INLINE void store(bfloat16* p, V v) {
  const Halves h = narrow(v);
  __builtin_memcpy(p, &h, sizeof(h));
}

// The first n elements, or a whole register where there are more.
FASTMLP_INLINE V load(const float* p, int64_t n) { return n < width ? load_some<V>(p, int(n)) : load(p); }
FASTMLP_INLINE V load(const bfloat16* p, int64_t n) {
  return n < width ? widen(load_some<Halves>(&p->bits, int(n))) : load(p);
}
FASTMLP_INLINE void store(float* p, V v, int64_t n) { n < width ? store_some(p, v, int(n)) : store(p, v); }
FASTMLP_INLINE void store(bfloat16* p, V v, int64_t n) {
  n < width ? store_some(&p->bits, narrow(v), int(n)) : store(p, v);
}

FASTMLP_INLINE Halves load_halves(const bfloat16* p, int64_t n) {
  return n < width ? load_some<Halves>(&p->bits, int(n)) : load_all<Halves>(p);
}

// What a product multiplies: a register of elements, or of pairs of them; the first n elements, as above.
template <class T>
FASTMLP_INLINE V operand(const T* p) {
  if constexpr (terms<T> == 2) return load_all<V>(p);
  else return load(p);
}
template <class T>
FASTMLP_INLINE V operand(const T* p, int64_t n) {
  if constexpr (terms<T> == 2) return n < 2 * width ? load_some<V>(&p->bits, int(n)) : operand(p);
  else return load(p, n);
}

// One element in all lanes, or a pair; of a pair that is not whole, the first and 0.
template <bool whole>
FASTMLP_INLINE V broadcast(const float* p) {
  return *p - V{};
}
template <bool whole>
FASTMLP_INLINE V broadcast(const bfloat16* p) {
  int32_t pair = p->bits;
  if (whole) __builtin_memcpy(&pair, p, sizeof(pair));
  return bit_cast<V>(pair + Bits{});
}

template <int terms, class R>
FASTMLP_INLINE R multiply_add(R sum, R a, R b) {
  if constexpr (terms == 2) return add_pairs(sum, a, b);
  else return sum + a * b;
}

// Calls f(Count<n>{}) with n, 1 <= n <= most, as a compile-time constant: the size of a register tile.
template <int n>
struct Count {
  static constexpr int value = n;
};
template <int most, class F>
FASTMLP_INLINE void with_count(int64_t n, F f) {
  if constexpr (most > 1) {
    if (n < most) return with_count<most - 1>(n, f);
  }
  f(Count<most>{});
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
template <bool whole, int rows, int columns, class T>
FASTMLP_INLINE void inner_step(V (&sum)[rows][columns], const T* x, int64_t ldx, const T* w, int64_t ldw,
                               int64_t n) {
  V b[columns];
#pragma GCC unroll 16
  for (int j = 0; j < columns; ++j) b[j] = whole ? operand(w + j * ldw) : operand(w + j * ldw, n);
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    const V a = whole ? operand(x + i * ldx) : operand(x + i * ldx, n);
#pragma GCC unroll 16
    for (int j = 0; j < columns; ++j) sum[i][j] = multiply_add<terms<T>>(sum[i][j], a, b[j]);
  }
}

// sums[i][j] = Σ_k x[i][k] w[j][k] for a tile of rows x columns.
template <int rows, int columns, class T>
void inner_tile(int64_t K, const T* x, int64_t ldx, const T* w, int64_t ldw, float* sums, int64_t ld) {
  constexpr int step = terms<T> * width;
  V sum[rows][columns] = {};
  int64_t k = 0;
  for (; k + step <= K; k += step) inner_step<true>(sum, x + k, ldx, w + k, ldw, step);
  if (k < K) inner_step<false>(sum, x + k, ldx, w + k, ldw, K - k);
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) store(sums + i * ld, sum_lanes<columns>(sum[i]), columns);
}

// ---- C = A B, with registers along the rows of C and B

// A panel of B: as many rows (or pairs of them) as a chunk of the sum, as wide as the tile. Where it lies in
// memory, its rows may be pages apart, or fall on one another in the first-level cache (at multiples of 4096
// bytes).
constexpr int chunk = 256, panel = outer_vectors * width;
struct alignas(64) Panel {
  float data[chunk * panel];
};

// The first `columns` of B's columns, and 0 beyond; of bfloat16, pairs of rows as rows of pairs.
template <class T>
void pack(Panel& to, const T* b, int64_t ldb, int64_t rows, int64_t columns) {
  for (int64_t p = 0; p < rows; p += terms<T>)
    for (int64_t j = 0; j < panel; j += width) {
      const T* at = b + p * ldb + j;
      const int64_t n = columns - j;
      V v{};
      if (n > 0) {
        if constexpr (terms<T> == 1) v = load(at, n);
        else v = paired(load_halves(at, n), p + 1 < rows ? load_halves(at + ldb, n) : Halves{});
      }
      store(to.data + p / terms<T> * panel + j, v);
    }
}

// Of a and b as rows of a matrix of blocks of `step` lanes: its transpose.
template <int step, int... lane>
FASTMLP_INLINE void interchange(V& a, V& b, std::integer_sequence<int, lane...>) {
  const V upper = __builtin_shufflevector(a, b, (lane & step ? width + lane - step : lane)...);
  b = __builtin_shufflevector(a, b, (lane & step ? width + lane : lane + step)...);
  a = upper;
}

template <int step = width / 2>
FASTMLP_INLINE void transpose(V* v) {
#pragma GCC unroll 16
  for (int i = 0; i < width; ++i)
    if (!(i & step)) interchange<step>(v[i], v[i + step], std::make_integer_sequence<int, width>{});
  if constexpr (step > 1) transpose<step / 2>(v);
}

// The transpose of the first `columns` rows of W: B[k][j] = w[j][k], and 0 beyond; of bfloat16, in pairs of k.
template <class T>
void pack_transposed(Panel& to, const T* w, int64_t ldw, int64_t depth, int64_t columns) {
  const int64_t rows = (depth + terms<T> - 1) / terms<T>;
  for (int64_t j = 0; j < panel; j += width)
    for (int64_t k = 0; k < rows; k += width) {
      V v[width];
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i)
        v[i] = j + i < columns ? operand(w + (j + i) * ldw + k * terms<T>, depth - k * terms<T>) : V{};
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i)
        if (k + i < rows) store(to.data + (k + i) * panel + j, v[i]);
    }
}

// sum[i][v] += a[i] b[v] for one term of the sum, or two at once; `last` and `cut` as below.
template <bool whole, bool cut, int rows, int vectors, class A, class B>
FASTMLP_INLINE void outer_step(V (&sum)[rows][vectors], const A* a, int64_t a_row, const B* b, int64_t last) {
  V row[vectors];
#pragma GCC unroll 16
  for (int v = 0; v < vectors; ++v)
    row[v] = cut && v == vectors - 1 ? load(b + v * width, last) : load(b + v * width);
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    const V factor = broadcast<whole>(a + i * a_row);
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) sum[i][v] = multiply_add<terms<A>>(sum[i][v], factor, row[v]);
  }
}

// A tile of rows x vectors registers of C; of each row's last register only `last` lanes are stored and, when
// `cut`, loaded from B. Bound by FMA: a step loads `vectors` registers and broadcasts `rows` factors for
// rows * vectors FMAs.
template <int rows, int vectors, bool cut, class A, class B, class C>
void outer_tile(int64_t P, const A* a, int64_t a_row, int64_t a_column, const B* b, int64_t ldb, C* c,
                int64_t ldc, int64_t last, bool accumulate) {
  constexpr int step = terms<A>;
  V sum[rows][vectors] = {};
  for (; P >= step; P -= step, a += step * a_column, b += ldb) outer_step<true, cut>(sum, a, a_row, b, last);
  if (P > 0) outer_step<false, cut>(sum, a, a_row, b, last);
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i, c += ldc) {
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      C* at = c + v * width;
      const int64_t n = v == vectors - 1 ? last : width;
      store(at, accumulate ? sum[i][v] + load(at, n) : sum[i][v], n);
    }
  }
}

// The tile of m <= outer_rows rows and n <= panel columns. `padded`: B's rows are whole registers, 0 beyond n.
template <class A, class B, class C>
FASTMLP_INLINE void outer(int64_t m, int64_t n, bool padded, int64_t P, const A* a, int64_t a_row,
                          int64_t a_column, const B* b, int64_t ldb, C* c, int64_t ldc, bool accumulate) {
  const int64_t vectors = (n + width - 1) / width, last = n - (vectors - 1) * width;
  with_count<outer_rows>(m, [&](auto m_tile) {
    with_count<outer_vectors>(vectors, [&](auto n_tile) {
      constexpr int rows = decltype(m_tile)::value, columns = decltype(n_tile)::value;
      constexpr bool may_cut = terms<A> == 1;  // pairs come from a panel
      const auto tile = padded || last == width ? outer_tile<rows, columns, false, A, B, C>
                                                : outer_tile<rows, columns, may_cut, A, B, C>;
      tile(P, a, a_row, a_column, b, ldb, c, ldc, last, accumulate);
    });
  });
}

// y = g(sums + b) for m rows and n columns.
template <Activation g, class T>
FASTMLP_INLINE void finish(const float* sums, int64_t ld, const T* bias, T* y, int64_t ldy, int64_t m,
                           int64_t n) {
  for (int64_t j = 0; j < n; j += width) {
    const V b = bias ? load(bias + j, n - j) : V{};
    for (int64_t i = 0; i < m; ++i)
      store(y + i * ldy + j, activate<g>(load(sums + i * ld + j, n - j) + b), n - j);
  }
}

// A of a packed product: rows in groups of a register's lanes, `group` apart. The second of a pair is always
// next to the first, and `column` half the distance from pair to pair.
template <class T>
struct Left {
  const T* data;
  int64_t row, column, group;
  const T* at(int64_t i, int64_t p) const { return data + i / width * group + i % width * row + p * column; }
};

// C = g(A B + bias), with B (or its transpose) packed a panel at a time. float32 is added up in C itself; of
// bfloat16 so many rows at a time that their float32 sums and the panel stay in the second-level cache, unless
// there is but one chunk, and nothing to do with its sums.
template <Activation g, bool transposed, class T>
void packed_product(const Left<T>& a, const T* b, int64_t ldb, int64_t P, const T* bias, T* c, int64_t ldc,
                    Range rows, Range columns) {
  constexpr int64_t block = 32 * outer_rows;
  alignas(64) float sums[std::is_same_v<T, float> ? 1 : block * panel];
  Panel packed;
  const bool finishes = g != Activation::identity || bias;
  const bool in_place = std::is_same_v<T, float> || (!finishes && P <= chunk * terms<T>);
  const int64_t step = in_place ? rows.end - rows.begin : block;
  for (int64_t first = rows.begin; first < rows.end; first += step)
    for (int64_t j = columns.begin; j < columns.end; j += panel) {
      const int64_t n = smaller(panel, columns.end - j), end = smaller(first + step, rows.end);
      int64_t p = 0;
      do {
        const int64_t depth = smaller(chunk * terms<T>, P - p);
        if constexpr (transposed) pack_transposed(packed, b + j * ldb + p, ldb, depth, n);
        else pack(packed, b + p * ldb + j, ldb, depth, n);
        for (int64_t i = first; i < end; i += outer_rows) {
          const int64_t m = smaller(outer_rows, end - i);
          const auto add_up = [&](auto* sum, int64_t ld) {
            outer(m, n, true, depth, a.at(i, p), a.row, a.column, packed.data, panel, sum, ld, p > 0);
          };
          T* to = c + i * ldc + j;
          float* sum = sums + (i - first) * panel;
          in_place ? add_up(to, ldc) : add_up(sum, panel);
          if (p + depth < P) continue;
          if (!in_place) finish<g>(sum, panel, bias ? bias + j : nullptr, to, ldc, m, n);
          else if constexpr (std::is_same_v<T, float>)
            finish<g>(to, ldc, bias ? bias + j : nullptr, to, ldc, m, n);
        }
        p += depth;
      } while (p < P);
    }
}

// ---- y = g(x Wᵀ + b)

// Registers along the sum: W as it is. A panel of W stays in the second-level cache while x streams past it;
// the sums of a few rows over the panel stay in the first-level one until bias and activation are applied.
template <Activation g, class T>
void forward_inner(const Forward& p, Range rows, Range columns) {
  const T* x = static_cast<const T*>(p.x);
  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);
  constexpr int wide = 16 * inner_columns;
  float sums[inner_rows][wide];
  for (int64_t n = columns.begin; n < columns.end; n += wide) {
    const int64_t n_count = smaller(wide, columns.end - n);
    for (int64_t m = rows.begin; m < rows.end; m += inner_rows) {
      const int64_t m_count = smaller(inner_rows, rows.end - m);
      with_count<inner_rows>(m_count, [&](auto m_tile) {
        for (int64_t j = 0; j < n_count; j += inner_columns)
          with_count<inner_columns>(smaller(inner_columns, n_count - j), [&](auto n_tile) {
            inner_tile<decltype(m_tile)::value, decltype(n_tile)::value>(
                p.K, x + m * p.ldx, p.ldx, weight + (n + j) * p.ldw, p.ldw, sums[0] + j, wide);
          });
      });
      finish<g>(sums[0], wide, bias ? bias + n : nullptr, static_cast<T*>(p.y) + m * p.N + n, p.N, m_count,
                n_count);
    }
  }
}

// Registers along the rows of y: W transposed, a panel at a time.
template <Activation g, class T>
void forward_outer(const Forward& p, Range rows, Range columns) {
  const Left<T> x = {static_cast<const T*>(p.x), p.ldx, 1, width * p.ldx};
  packed_product<g, true>(x, static_cast<const T*>(p.weight), p.ldw, p.K, static_cast<const T*>(p.bias),
                          static_cast<T*>(p.y), p.N, rows, columns);
}

// Counts multiply-adds, to choose: adding up the lanes of a sum costs about as much as 5 of them, transposing
// an element as 2, however many rows then use it. Of the whole matrix and not of this thread's block: the two
// add up in different orders, and the number of threads must not decide between them.
template <Activation g, class T>
void forward(const Forward& p, Range rows, Range columns) {
  if constexpr (std::is_same_v<T, float> || terms<T> == 2) {
    const int64_t depth = (p.K + terms<T> - 1) / terms<T>;
    const int64_t inner = p.M * p.N * ((depth + width - 1) / width + 5);
    const int64_t outer = p.M * ((p.N + width - 1) / width) * depth + 2 * p.N * depth;
    if (outer < inner) return forward_outer<g, T>(p, rows, columns);
  }
  forward_inner<g, T>(p, rows, columns);
}

// ---- dz = dy · g'(y), db = Σ dz

// A sum of many terms, added up in blocks of blocks: the rounding error grows with the levels' sixteens, not
// with the number of terms.
struct BlockedSum {
  static constexpr int block = 16, levels = 4;
  V inner{}, outer[levels]{};
  uint64_t count = 0;
  FASTMLP_INLINE void add(V v) {
    inner += v;
    if (++count % block) return;
    outer[0] += inner;
    inner = V{};
    uint64_t blocks = count / block;
    for (int i = 1; i < levels && blocks % block == 0; ++i, blocks /= block) {
      outer[i] += outer[i - 1];
      outer[i - 1] = V{};
    }
  }
  FASTMLP_INLINE V sum() const { return outer[3] + (outer[2] + (outer[1] + (outer[0] + inner))); }
};

// Bound by bandwidth: reads dy and y once, writes dz once or twice. Columns go to threads, so that a sum over
// the batch never depends on how many there are.
template <Activation g, class T>
void differentiate(const Backward& p, const Derivative& dz, Range columns) {
  const T* grad_y = static_cast<const T*>(p.grad_y);
  const T* y = static_cast<const T*>(p.y);
  T* grad_bias = static_cast<T*>(p.grad_bias);
  float* const full = dz.full;
  T* const rows = static_cast<T*>(dz.rows);
  for (int64_t n = columns.begin; n < columns.end; n += width) {
    const int64_t count = columns.end - n;
    float* pair = dz.pairs ? static_cast<float*>(dz.pairs) + n * ((p.M + 1) / 2) : nullptr;
    Halves even{};
    BlockedSum sum;
    for (int64_t m = 0, at = n; m < p.M; ++m, at += p.N) {
      V v = load(grad_y + at, count);
      if constexpr (g != Activation::identity) v = activate_backward<g>(v, load(y + at, count));
      sum.add(v);
      if (full) store(full + at, v, count);
      if constexpr (terms<T> == 2) {
        if (rows) store(rows + at, v, count);
        if (m % 2 == 0) even = narrow(v);
        if (!pair || (m % 2 == 0 && m + 1 < p.M)) continue;
        store(pair, paired(even, m % 2 ? narrow(v) : Halves{}));
        pair += width;
      }
    }
    if (grad_bias) store(grad_bias + n, sum.sum(), count);
  }
}

// ---- dx = dz W, dW = dzᵀ x

// From this many rows of C on, a packed panel of B is read often enough to pay for the copy.
constexpr int64_t least_packed_rows = 8 * outer_rows;

template <class T>
void product(const Product& p, Range rows, Range columns) {
  const T* b = static_cast<const T*>(p.b);
  T* c = static_cast<T*>(p.c);
  if constexpr (terms<T> == 2) {
    if (p.in_pairs)
      return packed_product<Activation::identity, false>(
          Left<T>{static_cast<const T*>(p.a), p.a_row, p.a_column, p.a_group}, b, p.ldb, p.P,
          static_cast<const T*>(nullptr), c, p.ldc, rows, columns);
  }
  const float* a = static_cast<const float*>(p.a);
  constexpr bool is_float = std::is_same_v<T, float>;
  const bool packs = is_float && rows.end - rows.begin >= least_packed_rows;
  // bfloat16 has nowhere to keep a partial sum: its chunk is the whole depth.
  const int64_t depth = is_float ? chunk : p.P;
  Panel packed;
  int64_t k = 0;
  do {
    const int64_t P = smaller(depth, p.P - k);
    for (int64_t j = columns.begin; j < columns.end; j += panel) {
      const int64_t n = smaller(panel, columns.end - j);
      const T* b_panel = b + k * p.ldb + j;
      int64_t ldb = p.ldb;
      if constexpr (is_float) {
        if (packs) {
          pack(packed, b_panel, p.ldb, P, n);
          b_panel = packed.data, ldb = panel;
        }
      }
      for (int64_t i = rows.begin; i < rows.end; i += outer_rows)
        outer(smaller(outer_rows, rows.end - i), n, packs, P, a + i * p.a_row + k * p.a_column, p.a_row,
              p.a_column, b_panel, ldb, c + i * p.ldc + j, p.ldc, k > 0);
    }
    k += depth;
  } while (k < p.P);
}

// ---- the table that backend.cpp chooses from

void forward(const Forward& p, Range rows, Range columns) {
  with_activation(p.activation, [&](auto g) {
    if (p.dtype == Dtype::float32) forward<decltype(g)::value, float>(p, rows, columns);
    else forward<decltype(g)::value, bfloat16>(p, rows, columns);
  });
}

void differentiate(const Backward& p, const Derivative& dz, Range columns) {
  with_activation(p.activation, [&](auto g) {
    if (p.dtype == Dtype::float32) differentiate<decltype(g)::value, float>(p, dz, columns);
    else differentiate<decltype(g)::value, bfloat16>(p, dz, columns);
  });
}

void product(const Product& p, Range rows, Range columns) {
  p.dtype == Dtype::float32 ? product<float>(p, rows, columns) : product<bfloat16>(p, rows, columns);
}

constexpr Kernels kernels = {
    inner_rows, inner_columns, outer_rows, outer_vectors * width, multiplies_pairs ? width : 0,
    forward,    differentiate, product};
