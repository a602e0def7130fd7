// Training steps of a small network in one launch: forward, loss, backward and the change of the parameters, step after
// step. float32, by multiply-adds.
//
// A hidden unit belongs to one block. It computes the unit's y and dz, and it keeps and changes the unit's row of W; of the
// last W the column. What others read goes through global memory, which is in the second-level cache. Bars are
// barriers of the whole grid, 2 (L - 1) a step:
//
//   y_1 | y_2 | ... | of some rows of the batch y_L, their losses, dz_L | dz_{L-1} | ... | dz_2 | dz_1
//
// Where that is sooner done than waited for, each block finds y_L and dz_L of all rows, and a barrier less is in a step.
//
// dz_{l-1} = dz_l W_l · g' needs the units' columns of W_l. They are copied before dz_L, since the owners of its rows change
// W_l while they wait for dz_{l-1} of others. y_1 and W_L have two places in turn: a block may be at the next step's while
// another still reads this one's. Clipping has one barrier more, with all changes behind it.
//
// Bound by latency: of the barriers, and of memory behind each. Every sum has an order that the shape alone decides, but for
// the sum of squares, where it is the number of blocks too.
#pragma once

#include "grid.cuh"
#include "lanes.cuh"
#include "step_arguments.cuh"
#include "update.cuh"

namespace fastmlp::cuda::whole_step {
static_assert(threads == most_threads);

struct Units {
  int first, count;
};
__device__ __forceinline__ Units units_of(const Layer& p) {
  const int first = static_cast<int>(blockIdx.x) * p.units;
  return {first, max(min(p.N4 - first, p.units), 0)};
}

// What a block does in a step.
class Worker {
 public:
  __device__ __forceinline__ Worker(const Arguments& a, int step, Grid& grid)
      : a(a), step(step), grid(grid), shared(reinterpret_cast<float*>(ptx::dynamic_shared_memory())) {}

  // The units' rows of every weight but the last, with zeros to whole tiles.
  __device__ __forceinline__ void load_rows() const {
    for (int l = 0; l + 1 < a.count; ++l) {
      const Layer& p = a.layers[l];
      const Units own = units_of(p);
      for (int i = threadIdx.x; i < own.count * (p.K4 / tile); i += threads) {
        const int u = i / (p.K4 / tile), k = i % (p.K4 / tile) * tile;
        *reinterpret_cast<Pack<float>*>(shared + p.rows + u * p.K4 + k) = pack_of(p, own.first + u, k);
      }
    }
  }

  __device__ __forceinline__ void run() {
    const float divided_by = a.loss.divisor<Warp>(a.M, step * a.target_step);
    for (int l = 0; l + 1 < a.count; ++l) {
      if (l > 0) grid.synchronize();
      forward(l);
    }
    load_columns();
    grid.synchronize();
    last_layer(1.0f / divided_by);
    if (a.repeats) __syncthreads();
    else grid.synchronize();
    if (blockIdx.x == 0 && threadIdx.x < Warp::size()) {
      float sum = 0.0f;
      for (int m = threadIdx.x; m < a.M; m += Warp::size()) sum += a.losses[m];
      sum = Warp::across<Sum>(sum);
      if (threadIdx.x == 0) a.value[step] = sum / divided_by;
    }
    float factor = 1.0f;
    for (bool again = false, clips = a.max_norm > 0.0;; again = true) {
      for (int l = a.count - 1; l >= 0; --l) {
        if (!again && l > 0) backward(l);
        if (!again && l > 1) grid.arrive();
        if (!again && l == 1) __syncthreads();
        gradients(l, clips, again, factor);
        if (!again && l > 1) grid.wait();
      }
      if (!clips || again) return;
      factor = clipping_factor();
    }
  }

 private:
  // Of a row of W; zeros beyond it.
  static __device__ __forceinline__ Pack<float> pack_of(const Layer& p, int n, int k) {
    const bool aligned = p.K % tile == 0 && is_aligned<float>(reinterpret_cast<uintptr_t>(p.weight));
    return n < p.N ? load(p.weight + int64_t{n} * p.K + k, p.K - k, aligned) : Pack<float>{};
  }

  static __device__ __forceinline__ float bias_of(const Layer& p, int n) { return p.bias ? p.bias[n] : 0.0f; }

  __device__ __forceinline__ float* y_of(int l) const {  // of a hidden layer
    const Layer& p = a.layers[l];
    return p.y + (l == 0 && step % 2 ? int64_t{a.M} * p.N4 : 0);
  }
  __device__ __forceinline__ float* last_row(int n) const {
    const Layer& p = a.layers[a.count - 1];
    return a.last + (step % 2 * p.N4 + n) * (p.K4 + tile);
  }
  __device__ __forceinline__ float* dz_of(int l) const {
    const Layer& p = a.layers[l];
    return a.repeats && l + 1 == a.count ? shared + a.outputs + 2 * a.rows * p.N4 : p.dz;
  }
  __device__ __forceinline__ Rows input_of(int l) const {
    const Layer& p = a.layers[l];
    const float* const x = l > 0 ? y_of(l - 1) : a.x + step * a.x_step;
    __builtin_assume(__isGlobal(x));
    return {x, l > 0 ? p.K4 : a.ldx, l > 0 ? p.K4 : p.K, l > 0 || a.packed};
  }

  __device__ __forceinline__ void forward(int l) const {
    const Layer& p = a.layers[l];
    const Units own = units_of(p);
    float* const y = y_of(l);
    const auto bias = [&](int, int u) { return u + own.first < p.N ? bias_of(p, u + own.first) : 0.0f; };
    const auto finish = [&](int m, int u, float sum, float bias) {
      const int at = m * p.N4 + own.first + u;
      if (p.z) p.z[at] = sum + bias;
      y[at] = own.first + u < p.N ? activated(p.activation, sum + bias) : 0.0f;  // else of no unit
    };
    multiply<false>(input_of(l), a.M, {shared + p.rows, p.K4, p.K4, true}, own.count, p.K, bias, finish);
  }

  // Of every weight but the first, for the units of the layer below: transposed, with zeros to whole tiles. Those of the last
  // go to where all blocks read its rows.
  __device__ __forceinline__ void load_columns() const {
    for (int l = 1; l < a.count; ++l) {
      const Layer& p = a.layers[l];
      const Units own = units_of(a.layers[l - 1]);
      for (int i = threadIdx.x; i < p.N4 * (own.count / tile); i += threads) {
        const int n = i % p.N4, u = i / p.N4 * tile;
        const Pack<float> w = pack_of(p, n, own.first + u);
        for (int e = 0; e < tile; ++e) shared[p.columns + (u + e) * p.N4 + n] = w.elements[e];
        if (l + 1 == a.count) store(last_row(n) + own.first + u, w, tile, true);
      }
    }
    const Layer& last = a.layers[a.count - 1];
    if (blockIdx.x == 0)
      for (int n = threadIdx.x; n < last.N; n += threads) last_row(n)[last.K4] = bias_of(last, n);
  }

  // The block's rows of the batch, each with its loss and dz on one warp.
  __device__ __forceinline__ void last_layer(float scale) const {
    const Layer& p = a.layers[a.count - 1];
    const int first = a.repeats ? 0 : int(blockIdx.x) * a.rows, rows = max(min(a.M - first, a.rows), 0);
    float *const zs = shared + a.outputs, *const ys = zs + a.rows * p.N4, *const dys = ys + a.rows * p.N4;
    const Rows x{y_of(a.count - 2) + int64_t{first} * p.K4, p.K4, p.K4, true};
    const auto bias = [&](int, int n) { return last_row(n)[p.K4]; };
    const auto finish = [&](int m, int n, float sum, float bias) {
      zs[m * p.N4 + n] = sum + bias;
      ys[m * p.N4 + n] = activated(p.activation, sum + bias);
    };
    multiply<true>(x, rows, {last_row(0), p.K4 + tile, p.K4, true}, p.N, p.K, bias, finish);
    __syncthreads();
    const bool reads_z = reads(p.activation) == Reads::z;
    for (int row = threadIdx.x / Warp::size(); row < rows; row += threads / Warp::size()) {
      const float *const y = ys + row * p.N4, *const saved = reads_z ? zs + row * p.N4 : y;
      float *const dy = dys + row * p.N4, *const dz = dz_of(a.count - 1) + int64_t{first + row} * p.N4;
      const float loss = a.loss.of_row<Warp>(y, first + row, step * a.target_step, scale,
                                             [&](int64_t n, float value) { dy[n] = value; });
      for (int n = Warp::rank(); n < p.N4; n += Warp::size())
        dz[n] = n < p.N ? differentiated(p.activation, dy[n], saved[n]) : 0.0f;
      if (Warp::rank() == 0 && (!a.repeats || blockIdx.x == 0)) a.losses[first + row] = loss;
    }
  }

  // dz of the layer below l, of the units.
  __device__ __forceinline__ void backward(int l) const {
    const Layer &p = a.layers[l], &below = a.layers[l - 1];
    const Units own = units_of(below);
    const float* const saved = below.z ? below.z : y_of(l - 1);
    const auto at = [&](int m, int u) { return m * below.N4 + own.first + u; };
    const auto finish = [&](int m, int u, float dy, float saved) {
      below.dz[at(m, u)] = differentiated(below.activation, dy, saved);
    };
    multiply<true>(
        {dz_of(l), p.N4, p.N4, true}, a.M, {shared + p.columns, p.N4, p.N4, true}, own.count, p.N,
        [&](int m, int u) { return saved[at(m, u)]; }, finish);
  }

  // The units' rows of dW and db; of the last layer columns, and on the first block all db. Changes the parameters by
  // them; or keeps them first, where they are clipped, and again comes back to change by what it has kept.
  __device__ __forceinline__ void gradients(int l, bool clips, bool again, float factor) {
    const Layer& p = a.layers[l];
    const bool is_last = l + 1 == a.count, has_bias = !is_last || blockIdx.x == 0;
    if (!p.changes[0].is_wanted && !p.changes[1].is_wanted) return;
    const Units own = units_of(a.layers[is_last ? l - 1 : l]), all{0, is_last ? p.N4 : p.K4};
    const Units ns = is_last ? all : own, ks = is_last ? own : all;
    const Rows x = input_of(l), dz{dz_of(l) + ns.first, p.N4, p.N4, true};
    for_tiles(tile, tiles_of(ns.count), tiles_of(ks.count) + has_bias, [&](int row, int column, bool exists) {
      const int n0 = row * tile, k0 = column * tile;
      const bool is_bias = k0 == ks.count;  // behind the tiles of W: the sum of dz times one
      const int n = ns.first + n0 + threadIdx.x % tile, k = ks.first + k0, size = is_bias ? 1 : p.K - k;
      const Layer::Change& c = p.changes[is_bias];
      const int64_t at = is_bias ? n : int64_t{n} * p.K + k;
      const bool is_own = exists && n < p.N && size > 0 && c.is_wanted;
      const bool aligned = at % tile == 0 && update::is_aligned<float>(c.update, c.optimizer.states);
      update::Elements<float> elements;  // which are there when the sums are
      if (is_own && again == clips) elements.load(c.update, c.optimizer.states, at, size, aligned);
      Sums<> sums;
      if (!again) {
        const Rows terms = {is_bias ? nullptr : x.at(0, k), x.ld, x.columns - k, x.packed};
        const Rows own_dz{dz.at(0, n0), dz.ld, tile, true};
        if (terms.packed) multiply_transposed<true>(own_dz, terms, a.M, sums);
        else multiply_transposed<false>(own_dz, terms, a.M, sums);
        sums.add_up<tile / 2>();
      }
      if (!is_own) return;
      Pack<float> g{{sums.own[0], sums.own[1], sums.own[2], sums.own[3]}};
      if (clips) {
        float* const kept = static_cast<float*>(const_cast<void*>(c.update.grad)) + at;
        const bool aligned = is_aligned<float>(reinterpret_cast<uintptr_t>(kept));
        if (!again) {
          for (int e = 0; e < tile; ++e)
            if (e < size) squares += double{g.elements[e]} * g.elements[e];
          return store(kept, g, size, aligned);
        }
        g = load(kept, size, aligned);
        for (int e = 0; e < tile; ++e) g.elements[e] *= factor;
      }
      change(c, g, elements);
      elements.store(c.update, c.optimizer.states, at, size, aligned);
      if (!is_last && !is_bias) store(shared + p.rows + (n - own.first) * p.K4 + k, elements.w, size, true);
    });
  }

  __device__ __forceinline__ void change(const Layer::Change& c, const Pack<float>& g,
                                         update::Elements<float>& elements) const {
    Optimizer o = c.optimizer;
    Rates rates = c.update.rates;
    if (o.in_memory) {
      const StepNumbers& numbers = c.update.numbers[step * a.numbers_step];
      o = numbers.optimizer, rates = numbers.rates;
      o.kind = c.optimizer.kind, o.states = c.optimizer.states;
    } else if (step > 0) {
      o.first = false;
    }
    with_rule(o, [&](auto named) { elements.change(typename decltype(named)::type(o, rates), g); });
  }

  __device__ __forceinline__ float clipping_factor() {
    const double own = across<Sum>(squares);
    if (threadIdx.x == 0) a.squares[blockIdx.x] = own;
    grid.synchronize();
    double sum = 0.0;
    for (unsigned b = threadIdx.x; b < gridDim.x; b += threads) sum += a.squares[b];
    const double norm = sqrt(across<Sum>(sum));
    if (blockIdx.x == 0 && threadIdx.x == 0) *a.norm = static_cast<float>(norm);
    return factor_of({Dtype::float32, a.max_norm, false, nullptr}, norm, true);
  }

  const Arguments& a;
  const int step;
  Grid& grid;
  float* const shared;
  double squares = 0.0;  // of the gradients that the thread has kept
};

__global__ void __launch_bounds__(threads, 1) train(const __grid_constant__ Arguments a) {
  Grid grid(a.arrived);
  for (int step = 0; step < a.steps; ++step) {
    Worker worker(a, step, grid);
    if (step == 0) worker.load_rows();
    __syncthreads();
    worker.run();
  }
}

// How a step is done on the current device; of no blocks where it is to be done by other kernels.
inline Plan plan(const Shape& shape) {
  int device = 0, multiprocessors = 0, cooperates = 0;
  if (cudaGetDevice(&device) != cudaSuccess || !has_code<train>(device)) return {};
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&cooperates, cudaDevAttrCooperativeLaunch, device);
  return plan(shape, {cooperates ? multiprocessors : 0, most_shared_memory()});
}

inline int64_t workspace(const Step& s) {
  const Plan p = plan(shape_of(s));
  int64_t bytes = -1;
  if (p.blocks) arguments(s, p, nullptr, bytes);
  return bytes;
}

inline cudaError_t run(const Step& s, void* workspace, cudaStream_t stream) {
  const Plan p = plan(shape_of(s));
  int64_t bytes = 0;
  const Arguments a = arguments(s, p, static_cast<char*>(workspace), bytes);
  constexpr bool together = true;
  return launch_with<train, together>(4 * p.shared_floats, p.blocks, threads, stream, a);
}

}  // namespace fastmlp::cuda::whole_step
