// C = A B by blocks, with registers along the rows of C and B, and A broadcast.
//
// The blocks and their names are those of BLIS (Van Zee and van de Geijn, 2015). A block of B is packed, then block after
// block of A that meets it. A panel of B's stays in L1 while A's block streams past it from L2; or all panels in L2, if
// they have the room, and C is written row by row. What becomes of the sums is done in the registers that hold them.
//
// Rows are written from the last to the first. Forward passes read a weight from the first to the last: so each meets
// what the other has left in the cache, and a weight twice the size of L2 is half read from it.

#include "inner.h"
#include "update.h"

struct Scratch {
  alignas(64) float a[MC / MR * group];
  alignas(64) float b[NC * KC];
  alignas(64) float c[MC * NC];
  alignas(64) float rows[buffer_size];
};
static_assert(sizeof(Scratch) <= scratch_bytes);

// ---- tiles of C in registers and in memory, where of each row's last register only `last` lanes are there

template <int rows, int vectors, class C>
FASTMLP_INLINE void fetch_tile(const C* c, int64_t ldc) {
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) __builtin_prefetch(c + i * ldc + (v + 1) * width - 1, 1);
}

template <int rows, int vectors, class C>
FASTMLP_INLINE void add_tile(V (&sum)[rows][vectors], const C* c, int64_t ldc, int64_t last) {
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v)
      sum[i][v] += load(c + i * ldc + v * width, v == vectors - 1 ? last : width);
}

template <int rows, int vectors, class C>
FASTMLP_INLINE void store_tile(const V (&sum)[rows][vectors], C* c, int64_t ldc, int64_t last) {
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v)
      store(c + i * ldc + v * width, sum[i][v], v == vectors - 1 ? last : width);
}

// What becomes of a tile's sums.
enum class End {
  sums,    // they are stored: more follow, or they are C itself
  output,  // C = sums + bias, or the ReLU of that
  change,  // param -= rate * sums
  other    // any activation, any kind of optimizer: by way of memory
};

template <class T>
End end_of(const Product& p) {
  const bool is_relu = p.activation == Activation::relu;
  if (const Optimizer* const o = p.optimizer) {
    const bool is_plain = o->kind == Optimizer::sgd && !o->states && o->weight_decay == 0 && !o->maximize;
    return is_plain ? End::change : End::other;
  }
  if (p.activation != Activation::identity && !is_relu) return End::other;
  return is_relu || p.bias || p.c_dtype != Dtype::float32 ? End::output : End::sums;
}

// A tile of C, and the sums over what of A B has been added up before.
struct Target {
  int64_t i, j;  // in C
  End end;
  bool adds;  // to `sums`
  float* sums;
  int64_t ld;
};

// The whole sums of m rows and n columns become what `p` says.
template <class T>
void finish(const Product& p, const float* sums, int64_t ld, int64_t i, int64_t j, int64_t m, int64_t n) {
  const int64_t at = i * p.ldc + j;
  if (p.optimizer) return descend(*p.optimizer, p.update, at, p.ldc, sums, ld, m, n);
  finish(p.activation, sums, ld, p.z ? static_cast<T*>(p.z) + at : nullptr, static_cast<T*>(p.c) + at, p.ldc,
         m, n);
}

template <class T, int rows, int vectors>
FASTMLP_INLINE void fetch(const Product& p, const Target& t) {
  const int64_t at = t.i * p.ldc + t.j;
  if (t.end == End::sums) fetch_tile<rows, vectors>(t.sums, t.ld);
  else if (!p.optimizer) fetch_tile<rows, vectors>(static_cast<const T*>(p.c) + at, p.ldc);
  else {
    fetch_tile<rows, vectors>(static_cast<const float*>(p.update.param) + at, p.ldc);
    for (int s = 0; s < p.optimizer->states; ++s)
      fetch_tile<rows, vectors>(static_cast<const float*>(p.update.states[s]) + at, p.ldc);
  }
}

template <class T, int rows, int vectors>
FASTMLP_INLINE void finish(const Product& p, const Target& t, V (&sum)[rows][vectors], int64_t last) {
  if (t.adds) add_tile(sum, t.sums, t.ld, last);
  if (t.end == End::sums) return store_tile(sum, t.sums, t.ld, last);
  if (p.bias) add_tile(sum, static_cast<const T*>(p.bias) + t.j, 0, last);
  const int64_t at = t.i * p.ldc + t.j;
  if (t.end == End::output) {
    if (p.activation == Activation::relu)
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) sum[i][v] = Relu{}(sum[i][v]);
    return store_tile(sum, static_cast<T*>(p.c) + at, p.ldc, last);
  }
  if (t.end == End::change) {
    const Sgd<0> plain(Optimizer{}, p.update.rates);
    float* const param = static_cast<float*>(p.update.param) + at;
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) {
        float* const w = param + i * p.ldc + v * width;
        const int64_t n = v == vectors - 1 ? last : width;
        store(w, plain(load(w, n), sum[i][v], static_cast<V*>(nullptr)), n);
      }
    return;
  }
  alignas(64) float tile[rows * vectors * width];
  store_tile(sum, tile, vectors * width, width);
  finish<T>(p, tile, vectors * width, t.i, t.j, rows, (vectors - 1) * width + last);
}

template <bool packed, class T>
using Stored = std::conditional_t<packed, float, T>;  // an element of B: of a packed one, a slot

// A tile of rows x vectors registers of C, from A (element (i, p) at i * lda + p, or by slots at p * MR + i) and rows
// of B, whose last register is loaded in part where B is not a panel. Bound by FMA: a step loads `vectors` registers and
// broadcasts `rows` slots for rows * vectors FMAs. lda is always KC, but as a
// constant it makes GCC 12's loop slower, by up to a tenth.
template <int rows, int vectors, int terms, bool by_slots, bool packed, class T>
void outer_tile(const Product& p, const Target& t, int64_t last, int64_t P, const float* a, int64_t lda,
                const Stored<packed, T>* b, int64_t ldb) {
  fetch<T, rows, vectors>(p, t);
  V sum[rows][vectors] = {};
  for (; P > 0; --P, a += by_slots ? MR : 1, b += packed ? NR : ldb) {
    V right[vectors];
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v)
      right[v] = packed || v < vectors - 1 ? load(b + v * width) : load(b + v * width, last);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const V left = a[by_slots ? i : i * lda] - V{};
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) sum[i][v] = multiply_add<terms>(sum[i][v], left, right[v]);
    }
  }
  finish<T>(p, t, sum, last);
}

// The registers in a row of a tile of so many rows: a panel's; where B is read in place, as many as there are
// sums for, since few rows are bound by the bandwidth of B.
template <bool packed>
constexpr int vectors_of(int rows) {
  return packed ? outer_vectors : int(smaller(8, MR * outer_vectors / rows));
}

// m <= MR rows of a group of A times n columns of B.
template <int terms, bool by_slots, bool packed, class T>
void outer_row(const Product& p, Target t, int64_t m, int64_t n, int64_t P, const float* a, int64_t lda,
               const Stored<packed, T>* b, int64_t ldb) {
  with_count<MR>(m, [&](auto m_tile) {
    constexpr int rows = decltype(m_tile)::value, most = vectors_of<packed>(rows);
    for (int64_t j = 0; j < n; j += most * width, t.j += most * width, t.sums += most * width) {
      const int64_t count = smaller(most * width, n - j), vectors = ceil_div(count, width);
      with_count<most>(vectors, [&](auto n_tile) {
        outer_tile<rows, decltype(n_tile)::value, terms, by_slots, packed, T>(
            p, t, count - (vectors - 1) * width, P, a, lda, b + j, ldb);
      });
    }
  });
}

// ---- the loops around them

template <int terms, bool packed, class T>
struct Multiplication {
  const Product& p;
  Scratch& scratch;
  const T *a, *b;
  int64_t chunks, deep;  // the sum is taken in so many blocks, of so many terms
  bool in_place;         // float32 is added up in C itself; else a block of C at a time in `scratch`

  Multiplication(const Product& p, Scratch& scratch)
      : p(p), scratch(scratch), a(static_cast<const T*>(p.a.data)), b(static_cast<const T*>(p.b.data)) {
    chunks = larger(1, ceil_div(p.P, KC * terms));
    deep = ceil_div(ceil_div(p.P, chunks), terms) * terms;
    in_place = p.c_dtype == Dtype::float32 && !(p.optimizer && chunks == 1);
  }

  void run(Range rows, Range columns) {
    const int64_t together = in_place || chunks == 1 ? larger(1, rows.size()) : MC;
    const int64_t blocks = larger(1, ceil_div(columns.size(), NC));  // one even of nothing: for A's own sums
    for (int64_t first = rows.begin; first < rows.end; first += together)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t j = columns.begin + block * NC, n = smaller(NC, columns.end - j);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const int64_t k = chunk * deep, depth = smaller(deep, p.P - k);
          pack_right(j, n, k, depth);
          const int64_t count = smaller(together, rows.end - first);
          for (int64_t offset = (count - 1) / MC * MC; offset >= 0; offset -= MC) {
            const int64_t i = first + offset, m = smaller(MC, count - offset);
            float* const sums = in_place ? static_cast<float*>(p.c) + i * p.ldc + j : scratch.c;
            const End end = chunk + 1 < chunks ? End::sums : end_of<T>(p);
            const Target t = {i, j, end, p.accumulate || chunk > 0, sums, in_place ? p.ldc : NC};
            pack_left(i, m, k, depth, block == 0 && p.sums ? p.sums + i : nullptr);
            if (p.a.transposed) tiles<true>(t, m, n, k, ceil_div(depth, terms));
            else tiles<false>(t, m, n, k, ceil_div(depth, terms));
          }
        }
      }
  }

  void pack_right(int64_t j, int64_t n, int64_t k, int64_t depth) {
    if constexpr (packed) {
      if (p.b.transposed) pack_transposed<terms>(scratch.b, b + j * p.b.ld + k, p.b.ld, depth, n);
      else {
        const T* const from = b + k * p.b.ld + j;
        if (p.b.activation == Activation::identity)
          pack_panels<terms>(scratch.b, Plain<const T*>{from, p.b.ld}, depth, n);
        else
          pack_panels<terms>(scratch.b,
                             Activated<T>{p.b.activation, from, p.b.ld, reinterpret_cast<T*>(scratch.rows)},
                             depth, n);
      }
    }
  }

  void pack_left(int64_t i, int64_t m, int64_t k, int64_t depth, float* sums) {
    const int64_t at = p.a.transposed ? k * p.a.ld + i : i * p.a.ld + k;
    const auto pack = [&](const auto& source) {
      if (p.a.transposed) pack_columns<terms>(scratch.a, source, m, depth, sums, p.accumulate || k > 0);
      else pack_rows<terms>(scratch.a, source, m, depth);
    };
    const T* const saved = static_cast<const T*>(p.a.saved);
    if (p.a.activation == Activation::identity) pack(Plain<const T*>{a + at, p.a.ld});
    else if (p.a.activation == Activation::relu) pack(Plain<Rectified<T>>{{a + at, saved + at}, p.a.ld});
    else pack(Differentiated<T>{p.a.activation, a + at, saved + at, p.a.ld, scratch.rows});
  }

  // The tiles of a block of C, row by row if B's panels have room in L2, else panel by panel.
  template <bool by_slots>
  void tiles(const Target& block, int64_t m, int64_t n, int64_t k, int64_t P) {
    constexpr int64_t resident = 1 << 16;  // slots of B
    const bool row_by_row = P * n <= resident;
    const int64_t wide = packed ? NR : larger(1, n), groups = ceil_div(m, MR), panels = ceil_div(n, wide);
    for (int64_t outer = 0; outer < (row_by_row ? groups : panels); ++outer)
      for (int64_t inner = 0; inner < (row_by_row ? panels : groups); ++inner) {
        const int64_t r = row_by_row ? groups - 1 - outer : inner, c = row_by_row ? inner : outer;
        Target t = block;
        t.i += r * MR, t.j += c * wide, t.sums += r * MR * t.ld + c * wide;
        const Stored<packed, T>* right;
        if constexpr (packed) right = scratch.b + c * panel;
        else right = b + k * p.b.ld + block.j;
        outer_row<terms, by_slots, packed, T>(p, t, smaller(MR, m - r * MR), smaller(wide, n - c * wide), P,
                                              scratch.a + r * group, KC, right, p.b.ld);
      }
  }
};

// From this many rows of C on, a packed block of B is used often enough to pay for the copy.
constexpr int64_t least_packed_rows = 3 * MR;

// Whether the product is of pairs of bfloat16.
template <class T>
bool in_pairs(bool reduced) {
  return multiplies_pairs && (std::is_same_v<T, bfloat16> || reduced);
}

template <class T>
void multiply(const Product& p, Range rows, Range columns, Scratch& scratch) {
  if (!p.b.transposed && p.I < least_packed_rows && p.b.activation == Activation::identity)
    return Multiplication<1, false, T>(p, scratch).run(rows, columns);
  if constexpr (multiplies_pairs) {
    if (in_pairs<T>(p.reduced)) return Multiplication<2, true, T>(p, scratch).run(rows, columns);
  }
  if constexpr (terms<T> == 1) Multiplication<1, true, T>(p, scratch).run(rows, columns);
}
