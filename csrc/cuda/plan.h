// The choice of kernels for a network on a GPU: which launches, in which order, cut how. It depends on shapes, on whose
// the products are, and on the shared memory of a block. The backend runs what it says. There is no CUDA in it: a build
// without CUDA tells the plan too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../kernels.h"
#include "h100.h"

namespace fastmlp::cuda {

// Of a large GPU. The number is fixed, so that no sum is split in another way on another GPU.
#ifndef FASTMLP_MULTIPROCESSORS
#define FASTMLP_MULTIPROCESSORS 128
#endif
inline constexpr int64_t multiprocessors = FASTMLP_MULTIPROCESSORS;

inline int64_t blocks_of(int64_t size, int64_t of_block) { return (size + of_block - 1) / of_block; }

constexpr int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// ---- a product

// How it is cut: C into tiles of size x size, and each tile's sum into splits of so many steps or fewer, which have 64
// bytes of each operand.
struct Cut {
  int size;
  int64_t tiles, splits, steps;
};

// The cut whose most loaded multiprocessor is through first. It has the tiles that fall to it, one after the other. A
// tile of 64 x 64 takes a third of the time of one of 128 x 128, which has four times its elements: twice as much goes
// through shared memory for each. Splits are as many as the multiprocessors need, and not shorter than 8 or 16 steps.
// The large tiles are of operands whose rows in memory, which are so long, are whole packs of 16 bytes.
inline Cut cut(Dtype dtype, int64_t rows, int64_t columns, int64_t K, int64_t length, int64_t other_length) {
  const int64_t all = std::max<int64_t>(blocks_of(K * bytes_of(dtype), 64), 1);
  const auto with_tiles_of = [&](int size) {
    const int64_t tiles = blocks_of(rows, size) * std::max<int64_t>(blocks_of(columns, size), 1);
    const int64_t most = std::max<int64_t>(all / (size / 8), 1);
    const int64_t splits = std::clamp<int64_t>(multiprocessors / std::max<int64_t>(tiles, 1), 1, most);
    const int64_t steps = blocks_of(all, splits);
    return Cut{size, tiles, blocks_of(all, steps), steps};
  };
  const auto time = [](const Cut& c) {
    return blocks_of(c.tiles * c.splits, multiprocessors) * c.steps * (c.size == 128 ? 3 : 1);
  };
  const Cut large = with_tiles_of(128), small = with_tiles_of(64);
  const bool whole = (length | other_length) * bytes_of(dtype) % 16 == 0;
  return whole && time(large) < time(small) ? large : small;
}

// The same splits of tiles of 64 x 64, where rows are further apart than they are long: it changes no bit.
inline Cut in_small_tiles(Cut c, int64_t rows, int64_t columns) {
  c.size = 64, c.tiles = blocks_of(rows, 64) * std::max<int64_t>(blocks_of(columns, 64), 1);
  return c;
}

// Where no table tells whose a product is: few operations are the kernels', where fewer launches win.
inline Owner owner_of(double operations) { return operations < 1e8 ? Owner::kernels : Owner::library; }

// ---- a pass over a matrix [rows, columns], whose columns it sums

// A thread has a pack of 16 bytes of columns, as many threads as `across` are beside each other; splits are of rows.
struct Share {
  int across;
  Cut cut;
};
inline Share share(Dtype dtype, int64_t rows, int64_t columns) {
  constexpr int64_t threads = 256, blocks = 4 * multiprocessors;
  const int64_t packs = blocks_of(columns * bytes_of(dtype), 16);
  int across = 1;
  while (across < 32 && across < packs) across *= 2;
  const int64_t tiles = blocks_of(packs, across), least = 4 * threads / across;  // four rows a thread
  const int64_t splits =
      std::clamp<int64_t>(blocks / std::max<int64_t>(tiles, 1), 1, blocks_of(rows + 1, least));
  const int64_t steps = blocks_of(rows + 1, splits);
  return {across, {0, tiles, blocks_of(rows + 1, steps), steps}};
}

// ---- a chain: all layers of a narrow network, by tiles of 64 rows and of all columns, up to 64 or 128

inline constexpr int most_links = 16;

// Of a block: for the rows, with gaps between their tiles, and for each of the weights that there is room for.
constexpr int64_t chain_rows_bytes(Dtype dtype, int columns) { return (64 + 1) * columns * bytes_of(dtype); }
constexpr int64_t chain_weight_bytes(Dtype dtype, int columns) { return columns * columns * bytes_of(dtype); }

// The widest that a layer gets or gives.
template <class Layer>
int64_t widest(const Layer* layers, int64_t count) {
  int64_t width = 0;
  for (int64_t i = 0; i < count; ++i) width = std::max({width, layers[i].N, layers[i].K});
  return width;
}

// How many weights there is room for, of a GPU whose blocks have so much shared memory.
inline int chain_slots(Dtype dtype, int64_t width, int64_t count, int64_t shared_bytes) {
  const int columns = width <= 64 ? 64 : 128;
  const int64_t room = shared_bytes - chain_rows_bytes(dtype, columns);
  return int(std::clamp<int64_t>(room / chain_weight_bytes(dtype, columns), 0, count));
}

// ---- a network

enum class Launch : int { forward, chain_forward, activate, differentiate, chain_backward, dx, dW, find_x };

// One launch, of a layer or from that on; of a product that is the library's, its call.
struct Planned {
  Launch launch;
  int64_t layer;
  Owner owner = Owner::kernels;
  bool forms_dz = false;  // of a pass: dz, and not the sums of its columns alone
  bool sums = false;      // of a pass: these too
};

// owner_of(kind, layer's dtype, reduced, operations) tells whose a product is.
template <class Layer, class OwnerOf>
bool is_chain(Kind kind, const Layer* layers, int64_t count, const OwnerOf& owner_of, int64_t shared_bytes) {
  const int64_t width = widest(layers, count);
  if (count < 2 || count > most_links || width > 128) return false;
  double operations = 0;
  for (int64_t i = 0; i < count; ++i) operations += 2.0 * layers[i].M * layers[i].N * layers[i].K;
  return owner_of(kind, layers->dtype, layers->reduced, operations) != Owner::library &&
         chain_slots(layers->dtype, width, count, shared_bytes) >= 2;
}

template <class OwnerOf>
std::vector<Planned> plan(const Forward* layers, int64_t count, const OwnerOf& owner_of,
                          int64_t shared_bytes) {
  if (is_chain(Kind::chain_forward, layers, count, owner_of, shared_bytes))
    return {{Launch::chain_forward, 0}};
  std::vector<Planned> launches;
  for (int64_t i = 0; i < count; ++i) {
    const Forward& f = layers[i];
    const Owner owner = owner_of(Kind::forward, f.dtype, f.reduced, 2.0 * f.M * f.N * f.K);
    launches.push_back({Launch::forward, i, owner});
    if (owner == Owner::library && (f.z || f.activation != Activation::identity))
      launches.push_back({Launch::activate, i});
  }
  return launches;
}

// x of a layer is to be found where only the z of the layer below has been saved.
inline bool is_found(const Backward& b) { return b.grad_weight && b.x_activation != Activation::identity; }

// dz of the last layer comes of a pass of its own. Each other is formed where dx of the layer above is: as that leaves the
// registers, or after the library's product. So is the x of that layer, where it has to be found. Then come dW and db,
// which that product has summed, or where it is the library's a pass.
template <class OwnerOf>
std::vector<Planned> plan(const Backward* layers, int64_t count, const OwnerOf& owner_of,
                          int64_t shared_bytes) {
  const bool chained = is_chain(Kind::chain_backward, layers, count, owner_of, shared_bytes);
  const auto owner = [&](Kind kind, const Backward& b) {
    return owner_of(kind, b.dtype, b.reduced, 2.0 * b.M * b.N * b.K);
  };
  std::vector<Planned> launches;
  const auto form = [&](int64_t i, bool is_there) {
    const Backward& b = layers[i];
    const bool forms_dz = !is_there && b.activation != Activation::identity;
    const bool sums = b.grad_bias && b.grad_weight && owner(Kind::dW, b) == Owner::library;
    if (forms_dz || sums) launches.push_back({Launch::differentiate, i, Owner::kernels, forms_dz, sums});
  };
  form(0, false);
  if (chained) launches.push_back({Launch::chain_backward, 0});
  for (int64_t i = 0; i < count; ++i) {
    const Backward& b = layers[i];
    const bool is_last = i + 1 == count, has_dx = !chained && (b.grad_x || !is_last);
    const Owner of_dx = chained ? Owner::kernels : owner(Kind::dx, b);
    if (has_dx) launches.push_back({Launch::dx, i, of_dx});
    if (!is_last) form(i + 1, of_dx == Owner::kernels);
    else if (is_found(b)) launches.push_back({Launch::find_x, i});
    if (b.grad_weight || b.grad_bias)
      launches.push_back({Launch::dW, i, b.grad_weight ? owner(Kind::dW, b) : Owner::kernels});
  }
  return launches;
}

// ---- what a launch is in numbers

struct Numbers {
  int64_t rows, columns, K;  // of C, and of the sum; of a chain all layers' K are added
  Cut cut;                   // of a chain with tiles of 64 rows, of a pass without
  int64_t blocks;            // 0 of the library's
  double fill;               // of the elements that the tiles multiply, those that are in the product
  int64_t bytes;             // that have to be read and written once
};

// Of operands without gaps, whose rows in memory are so long.
inline Numbers numbers_of_product(Dtype dtype, int64_t rows, int64_t columns, int64_t K, Owner owner,
                                  int64_t length, int64_t other_length) {
  const int64_t bytes = (rows * K + columns * K + rows * columns) * bytes_of(dtype);
  const Cut own = cut(dtype, rows, columns, K, length, other_length);
  if (owner == Owner::library) return {rows, columns, K, {}, 0, 1.0, bytes};
  const double fill = double(rows) * columns / (double(own.tiles) * own.size * own.size);
  return {rows, columns, K, own, own.tiles * own.splits, fill, bytes};
}

template <class Layer>
Numbers numbers_of_chain(const Layer* layers, int64_t count, bool is_forward) {
  const int64_t M = layers->M, tiles = blocks_of(M, 64), width = widest(layers, count) <= 64 ? 64 : 128;
  const int64_t depth = 64 / bytes_of(layers->dtype);
  int64_t K = 0, used = 0, multiplied = 0, elements = M * (is_forward ? layers->K : layers->N);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t along = is_forward ? layers[i].K : layers[i].N;
    const int64_t columns = is_forward ? layers[i].N : layers[i].K;
    K += along, used += M * layers[i].N * layers[i].K;
    multiplied += tiles * 64 * width * blocks_of(along, depth) * depth;
    elements +=
        layers[i].N * layers[i].K + M * columns + (is_forward ? 0 : M * columns);  // and what is saved
  }
  return {M,
          width,
          K,
          {64, tiles, 1, blocks_of(K, depth)},
          std::min(tiles, 2 * multiprocessors),
          double(used) / double(std::max<int64_t>(multiplied, 1)),
          elements * bytes_of(layers->dtype)};
}

inline Numbers numbers_of(const Planned& p, const Forward* layers, int64_t count) {
  const Forward& f = layers[p.layer];
  if (p.launch == Launch::chain_forward) return numbers_of_chain(layers, count, true);
  if (p.launch == Launch::forward) return numbers_of_product(f.dtype, f.M, f.N, f.K, p.owner, f.K, f.K);
  const int64_t bytes = f.M * f.N * bytes_of(f.dtype);
  return {f.M, f.N, 0, {}, blocks_of(bytes, 256 * 16), 1.0, 2 * bytes};
}

inline Numbers numbers_of(const Planned& p, const Backward* layers, int64_t count) {
  const Backward& b = layers[p.layer];
  if (p.launch == Launch::chain_backward)
    return numbers_of_chain(layers, layers[count - 1].grad_x ? count : count - 1, false);
  if (p.launch == Launch::dx) return numbers_of_product(b.dtype, b.M, b.K, b.N, p.owner, b.N, b.K);
  if (p.launch == Launch::dW) {
    Numbers own = numbers_of_product(b.dtype, b.N, b.K, b.M, p.owner, b.N, b.K);
    if (!b.grad_weight) own.blocks = blocks_of(b.N, 64) * own.cut.splits;  // that sum dz, for db
    return own;
  }
  if (p.launch == Launch::find_x) {
    const int64_t size = bytes_of(b.dtype), of_pack = 16 / size;
    const int64_t packs = b.ldx == b.K ? blocks_of(b.M * b.K, of_pack) : b.M * blocks_of(b.K, of_pack);
    return {b.M, b.K, 0, {}, blocks_of(packs, 256), 1.0, 2 * b.M * b.K * size};
  }
  const Share own = share(b.dtype, b.M, b.N);
  const int64_t bytes = (p.forms_dz ? 3 : 1) * b.M * b.N * bytes_of(b.dtype);
  return {b.M, b.N, 0, own.cut, own.cut.tiles * own.cut.splits, 1.0, bytes};
}

// Predicted; 0 of what is the library's. A step of a tile of 128 x 128 takes 80 % of the peak of multiply-adds, or 60 % of the
// tensor cores'; a smaller tile's a third of that, and no step less than its way through shared memory.
inline double microseconds(const Planned& p, const Numbers& n, Dtype dtype) {
  if (p.owner != Owner::kernels) return 0.0;
  const double rate = dtype == Dtype::float32 ? 0.8 * h100::multiply_adds : 0.6 * h100::tensor_multiply_adds;
  const double large = 128.0 * 128 * 64 / bytes_of(dtype) / rate;
  const double step = n.K ? std::max(n.cut.size == 128 ? large : large / 3, 0.25) : 0.0;
  const int64_t rounds = blocks_of(n.cut.tiles * n.cut.splits, multiprocessors);
  return h100::launch - h100::early + std::max(rounds * n.cut.steps * step, n.bytes / h100::memory_bytes);
}

}  // namespace fastmlp::cuda
