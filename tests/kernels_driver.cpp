// A backend without torch: the C functions that test_kernels.py calls, and a program for AddressSanitizer
// that runs every dtype and activation, and the loss, over awkward shapes in buffers of the exact size.
//
// Compiled with FASTMLP_EMULATE for the CUDA backend on the emulator, without for the CPU backend.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../csrc/activation.h"
#include "../csrc/kernels.h"
#include "cuda_emulator.h"
#ifdef FASTMLP_EMULATE
#include "../csrc/cuda/launch.cuh"
#include "../csrc/cuda/plan.h"
#endif

#ifndef FASTMLP_EMULATE
#include <atomic>

#include "../csrc/cpu/plan.h"

// For those of the instruction sets that this is linked without.
namespace fastmlp::cpu {
extern __attribute__((weak)) const Kernels avx512bf16_kernels, avx512_kernels, avx2_kernels, portable_kernels;
const Kernels avx512bf16_kernels{}, avx512_kernels{}, avx2_kernels{}, portable_kernels{};
}  // namespace fastmlp::cpu
#endif

using namespace fastmlp;

#ifdef FASTMLP_EMULATE
// In the place of torch's library. It writes nothing that it need not, and counts its calls.
static int64_t library_calls = 0;
template <class T>
static void multiply(const cuda::Product& p) {
  const T *a = static_cast<const T*>(p.a.data), *b = static_cast<const T*>(p.b.data),
          *bias = static_cast<const T*>(p.bias);
  ++library_calls;
  for (int64_t m = 0; m < p.rows; ++m)
    for (int64_t n = 0; n < p.columns; ++n) {
      double sum = bias ? cuda::to_float(bias[n]) : 0;
      for (int64_t k = 0; k < p.K; ++k)
        sum += double(cuda::to_float(a[m * p.a.strides[0] + k * p.a.strides[1]])) *
               cuda::to_float(b[k * p.b.strides[0] + n * p.b.strides[1]]);
      cuda::store(static_cast<T*>(p.c) + m * p.columns + n, float(sum));
    }
}
static void library(const cuda::Product& p) {
  if (p.dtype == Dtype::bfloat16) multiply<__nv_bfloat16>(p);
  else if (p.dtype == Dtype::float16) multiply<__half>(p);
  else multiply<float>(p);
}

template <int bytes>
struct Parameter {
  char all[bytes];
};
template <int number, int bytes>
static void nothing(Parameter<bytes>) {
  cudaGridDependencySynchronize();
}
template <int number, int bytes>
static int attempt_launch(int64_t blocks, int threads, int64_t shared_bytes, int id) {
  cudaLaunchAttribute attribute{cudaLaunchAttributeID(id), {1, 1}};
  const cudaLaunchConfig_t config{unsigned(blocks), unsigned(threads), size_t(shared_bytes),
                                  nullptr,          &attribute,        id > 0};
  return cudaLaunchKernelEx(&config, nothing<number, bytes>, Parameter<bytes>{});
}

// The blocks of each launch that the plan says, and of each that was made.
template <class Layer>
static int64_t planned(const Layer* layers, int64_t count, int64_t* blocks) {
  const auto owner = [](auto... of) { return cuda::owner_of(of...); };
  int64_t launches = 0;
  for (const cuda::Planned& p : cuda::plan(layers, count, owner, cuda::most_shared_memory()))
    if (const int64_t own = cuda::numbers_of(p, layers, count).blocks) blocks[launches++] = own;
  return launches;
}
#endif

// `variant` is what must not change a bit: the order of the emulator's threads, or how many the CPU's are.
[[maybe_unused]] static int threads(unsigned variant) { return int(1 + variant % 7); }

#ifndef FASTMLP_EMULATE
// What the linker puts in the place of libgomp's barrier: how often threads have come to one.
static std::atomic<int64_t> arrivals{0};
extern "C" void __real_GOMP_barrier();
extern "C" void __wrap_GOMP_barrier() {
  ++arrivals;
  __real_GOMP_barrier();
}
#endif

extern "C" {
const char* activations() {
#define FASTMLP_NAME(name, Type) #name " "
  return FASTMLP_ACTIVATIONS(FASTMLP_NAME);
}
int reads_z(const Activation* activation) { return reads(*activation) == Reads::z; }
#ifdef FASTMLP_EMULATE
int64_t planned_forward(const Forward* layers, int64_t count, int64_t* blocks) {
  return planned(layers, count, blocks);
}
int64_t planned_backward(const Backward* layers, int64_t count, int64_t* blocks) {
  return planned(layers, count, blocks);
}
void forget_launches() { emulator::grids.clear(); }
int64_t launched(int64_t* blocks) {  // since then
  const int64_t launches = int64_t(emulator::grids.size());
  std::copy(emulator::grids.begin(), emulator::grids.end(), blocks);
  return launches;
}
int use(const char* backend) {  // "cuda", or "cuda library" for one that leaves all products to the library
  const bool all = std::strcmp(backend, "cuda library") == 0;
  cuda::set_products(library, all ? cuda::Owner::library : cuda::Owner::kernels, nullptr, 0);
  return true;
}
int64_t calls_of_library() { return library_calls; }
void use_table(const cuda::Measured* rows, int64_t count) {
  cuda::set_products(library, cuda::Owner::table, rows, count);
}
int owner_of(int kind, int dtype, int reduced, double operations) {
  return int(cuda::owner_of(cuda::Kind(kind), Dtype(dtype), reduced, operations));
}
const char* complaint() { return emulator::complaint; }
// Counts what kernels ask of these ranges of global memory, and of shared memory, until the next call.
void count_traffic(const uintptr_t (*ranges)[2], int64_t count, emulator::Traffic* result) {
  if (result) *result = emulator::traffic;
  emulator::traffic = {};
  emulator::counts_traffic = count > 0;
  emulator::traced_count = size_t(count);
  for (int64_t i = 0; i < count; ++i) emulator::traced_data[i] = {ranges[i][0], ranges[i][1]};
}
void run_each_launch(unsigned times, void* result, int64_t bytes) {
  emulator::times = times, emulator::result = result, emulator::result_bytes = size_t(bytes);
}
int set_device(int device) { return cudaSetDevice(device); }
int device() { return emulator::device; }
int last_error() { return cudaGetLastError(); }
int runs_on(int device) { return cuda::runs_on(device); }
// A launch of a kernel that does nothing. `asked`: the shared memory that it may have, or 0 where it does not ask.
int attempt(int64_t blocks, int threads, int64_t shared_bytes, int64_t asked, int parameter_bytes,
            int attribute) {
  return parameter_bytes > 4096 ? attempt_launch<0, 4097>(blocks, threads, shared_bytes, attribute)
         : asked == 0           ? attempt_launch<0, 4096>(blocks, threads, shared_bytes, attribute)
         : cudaFuncSetAttribute(nothing<1, 4096>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(asked))
             ? -1
             : attempt_launch<1, 4096>(blocks, threads, shared_bytes, attribute);
}
int forward(const Forward* layers, int64_t count, void* workspace, unsigned variant) {
  emulator::order = variant;
  return cuda::forward(layers, count, workspace, nullptr);
}
int backward(const Backward* layers, int64_t count, void* workspace, unsigned variant) {
  emulator::order = variant;
  return cuda::backward(layers, count, workspace, nullptr);
}
int optimize(const Optimizer* o, const Update* updates, int64_t count, unsigned variant) {
  emulator::order = variant;
  return cuda::optimize(*o, updates, count, nullptr);
}
int64_t clip_workspace(const Clip* c, const Gradient* gradients, int64_t count) {
  return cuda::clip_workspace(*c, gradients, count);
}
int clip(const Clip* c, const Gradient* gradients, int64_t count, void* workspace, unsigned variant) {
  emulator::order = variant;
  return cuda::clip(*c, gradients, count, workspace, nullptr);
}
int64_t forward_workspace(const Forward* layers, int64_t count, unsigned) {
  return cuda::forward_workspace(layers, count);
}
int64_t backward_workspace(const Backward* layers, int64_t count, unsigned) {
  return cuda::backward_workspace(layers, count);
}
int64_t cross_entropy_workspace(const CrossEntropy* p) { return cuda::cross_entropy_workspace(*p); }
int64_t cross_entropy(const CrossEntropy* p, void* workspace, unsigned variant) {
  emulator::order = variant;
  return cuda::cross_entropy(*p, workspace, nullptr) ? -2 : -1;
}
#else
int use(const char* instruction_set) { return cpu::use(instruction_set); }
// Whether threads have come to as many barriers as the plan counts.
static int check_barriers(const cpu::Plan& plan, unsigned variant) {
  const int size = threads(variant);
  return arrivals.exchange(0) == (size > 1 ? size * plan.barriers : 0) ? 0 : -1;
}
int pays(int threads, double multiply_adds, int64_t barriers) {
  return cpu::pays(threads, multiply_adds, barriers, 1);
}
int forward(const Forward* layers, int64_t count, void* workspace, unsigned variant) {
  omp_set_num_threads(threads(variant));
  arrivals = 0;
  cpu::forward(layers, count, workspace, threads(variant));
  return check_barriers(cpu::Plan({.forward = layers, .forwards = count}, workspace, threads(variant)),
                        variant);
}
int backward(const Backward* layers, int64_t count, void* workspace, unsigned variant) {
  omp_set_num_threads(threads(variant));
  arrivals = 0;
  cpu::backward(layers, count, workspace, threads(variant));
  return check_barriers(cpu::Plan({.backward = layers, .backwards = count}, workspace, threads(variant)),
                        variant);
}
int forward_all(const Forward* layers, int64_t count, int64_t networks, void* workspace, unsigned variant) {
  omp_set_num_threads(threads(variant));
  cpu::forward(layers, count, networks, workspace, threads(variant));
  return 0;
}
int backward_all(const Backward* layers, int64_t count, int64_t networks, void* workspace, unsigned variant) {
  omp_set_num_threads(threads(variant));
  cpu::backward(layers, count, networks, workspace, threads(variant));
  return 0;
}
int64_t forward_all_workspace(const Forward* layers, int64_t count, int64_t networks, unsigned variant) {
  return cpu::forward_workspace(layers, count, networks, threads(variant));
}
int64_t backward_all_workspace(const Backward* layers, int64_t count, int64_t networks, unsigned variant) {
  return cpu::backward_workspace(layers, count, networks, threads(variant));
}
int optimize(const Optimizer* o, const Update* updates, int64_t count, unsigned variant) {
  omp_set_num_threads(threads(variant));
  cpu::optimize(*o, updates, count, threads(variant));
  return 0;
}
int64_t clip_workspace(const Clip*, const Gradient*, int64_t) { return 0; }
int clip(const Clip* c, const Gradient* gradients, int64_t count, void*, unsigned variant) {
  omp_set_num_threads(threads(variant));
  cpu::clip(*c, gradients, count, threads(variant));
  return 0;
}
int64_t forward_workspace(const Forward* layers, int64_t count, unsigned variant) {
  return cpu::forward_workspace(layers, count, threads(variant));
}
int64_t backward_workspace(const Backward* layers, int64_t count, unsigned variant) {
  return cpu::backward_workspace(layers, count, threads(variant));
}
int64_t cross_entropy_workspace(const CrossEntropy* p) { return cpu::cross_entropy_workspace(*p); }
int64_t cross_entropy(const CrossEntropy* p, void* workspace, unsigned variant) {
  omp_set_num_threads(threads(variant));
  return cpu::cross_entropy(*p, workspace, threads(variant));
}
#endif
}

namespace {

constexpr Activation::Kind kinds[] = {
#define FASTMLP_KIND(name, Type) Activation::name,
    FASTMLP_ACTIVATIONS(FASTMLP_KIND)};

float decode(float v) { return v; }
float decode(__half v) { return __half2float(v); }
float decode(__nv_bfloat16 v) { return __bfloat162float(v); }
void encode(float& to, float v) { to = v; }
void encode(__half& to, float v) { to = __float2half_rn(v); }
void encode(__nv_bfloat16& to, float v) { to = __float2bfloat16_rn(v); }

template <class T>
std::vector<T> wave(int64_t size, double phase) {  // values in [-1, 1]
  std::vector<T> values(size);
  for (int64_t i = 0; i < size; ++i) encode(values[i], std::sin(phase + 1.7 * i));
  return values;
}

int failures = 0;

template <class T>
void expect(const char* what, T got, double want, double terms = 0) {  // terms: the sum of their sizes
  const double tolerance = std::is_same_v<T, float> ? 1e-5 : 2e-2;
  if (std::abs(decode(got) - want) <= tolerance * (1 + std::max(std::abs(want), terms))) return;
  std::printf("%s: got %g, want %g\n", what, decode(got), want);
  ++failures;
}

template <class T>
void check(Dtype dtype, Activation g, int64_t M, int64_t N, int64_t K) {
  const int64_t ldx = K + 3, ldw = K + 5;  // the last row ends with its last element
  const auto x = wave<T>(M && K ? (M - 1) * ldx + K : 0, 1), w = wave<T>(N && K ? (N - 1) * ldw + K : 0, 2);
  const auto bias = wave<T>(N, 3), grad_y = wave<T>(M * N, 4);
  std::vector<T> y(M * N), z(M * N), grad_x(M * K), grad_weight(N * K), grad_bias(N);
  const bool reads_z = reads(g) == Reads::z;
  const Forward f{.dtype = dtype,
                  .reduced = false,
                  .activation = g,
                  .M = M,
                  .N = N,
                  .K = K,
                  .x = x.data(),
                  .ldx = ldx,
                  .weight = w.data(),
                  .ldw = ldw,
                  .bias = bias.data(),
                  .y = y.data(),
                  .z = reads_z ? z.data() : nullptr};
  const std::vector<T>& saved = reads_z ? z : y;
  const Backward b{.dtype = dtype,
                   .reduced = false,
                   .activation = g,
                   .M = M,
                   .N = N,
                   .K = K,
                   .grad_y = grad_y.data(),
                   .saved = saved.data(),
                   .x = x.data(),
                   .ldx = ldx,
                   .weight = w.data(),
                   .ldw = ldw,
                   .grad_x = grad_x.data(),
                   .grad_weight = grad_weight.data(),
                   .grad_bias = grad_bias.data(),
                   .x_activation = reads_z ? g : Activation{}};
  std::vector<char> workspace(std::max(forward_workspace(&f, 1, 1), backward_workspace(&b, 1, 1)));
  if (forward(&f, 1, workspace.data(), 1) || backward(&b, 1, workspace.data(), 1)) ++failures;

  std::vector<double> dx(M * K), dw(N * K), dw_terms(N * K), db(N);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      double sum = decode(bias[n]);
      for (int64_t k = 0; k < K; ++k) sum += double{decode(x[m * ldx + k])} * decode(w[n * ldw + k]);
      const int64_t at = m * N + n;
      if (reads_z) expect("z", z[at], sum);
      expect("y", y[at], activated(g, float(sum)));
      const double dz = differentiated(g, decode(grad_y[at]), decode(saved[at]));
#ifdef FASTMLP_EMULATE
      T stored;  // what is summed, as by torch
      encode(stored, float(dz));
      db[n] += decode(stored);
#else
      db[n] += dz;
#endif
      for (int64_t k = 0; k < K; ++k) {
        dx[m * K + k] += dz * decode(w[n * ldw + k]);
        const double term = dz * activated(b.x_activation, decode(x[m * ldx + k]));
        dw[n * K + k] += term, dw_terms[n * K + k] += std::abs(term);
      }
    }
  for (int64_t i = 0; i < M * K; ++i) expect("grad_x", grad_x[i], dx[i]);
  for (int64_t i = 0; i < N * K; ++i) expect("grad_weight", grad_weight[i], dw[i], dw_terms[i]);
  for (int64_t i = 0; i < N; ++i) expect("grad_bias", grad_bias[i], db[i]);
}

template <class T>
void check_cross_entropy(Dtype dtype, int64_t N, int64_t C, bool weighted, float smoothing) {
  const auto z = wave<T>(N * C, 1);
  auto weight = wave<float>(C, 2);
  for (float& w : weight) w = weighted ? 1.5f + w : 1.0f;
  std::vector<int64_t> target(N);
  for (int64_t i = 0; i < N; ++i) target[i] = i % 5 == 4 ? -100 : i * 7 % C;
  std::vector<float> grad(N * C);
  std::vector<T> loss(N);
  const CrossEntropy p{dtype,
                       Reduction::none,
                       N,
                       C,
                       z.data(),
                       target.data(),
                       weighted ? weight.data() : nullptr,
                       -100,
                       smoothing,
                       loss.data(),
                       grad.data()};
  std::vector<char> workspace(cross_entropy_workspace(&p));
  if (cross_entropy(&p, workspace.data(), 1) != -1) ++failures;

  for (int64_t i = 0; i < N; ++i) {
    double sum = 0, want = 0, all = 0;
    for (int64_t c = 0; c < C; ++c) sum += std::exp(double{decode(z[i * C + c])});
    const auto q = [&](int64_t c) {
      return target[i] < 0 ? 0 : weight[c] * ((1 - smoothing) * (c == target[i]) + smoothing / double(C));
    };
    for (int64_t c = 0; c < C; ++c) want += q(c) * (std::log(sum) - decode(z[i * C + c])), all += q(c);
    expect("loss", loss[i], want);
    for (int64_t c = 0; c < C; ++c)
      expect("grad", grad[i * C + c], std::exp(double{decode(z[i * C + c])}) / sum * all - q(c));
  }
}

// Two steps of tensors that begin at any address, the first of the momentum's.
template <class T>
void check_optimizer(Optimizer o) {
  std::vector<std::vector<T>> params, grads, states[most_states];
  std::vector<Update> updates;
  const double rate = 0.5, inverse_root = 2;
  for (int64_t size : {0, 1, 3, 17, 64, 1000, 5000}) {
    params.push_back(wave<T>(size + 1, 1));
    grads.push_back(wave<T>(size + 1, 2));
    Update u{};
    u.param = params.back().data() + 1, u.grad = grads.back().data() + 1;
    for (int k = 0; k < o.states; ++k) {
      states[k].push_back(wave<T>(size + 1, 3 + k));
      for (T& value : states[k].back())
        if (k > 0 && decode(value) < 0) encode(value, -decode(value));  // a mean of squares
      u.states[k] = states[k].back().data() + 1;
    }
    u.size = size, u.rates = {float(rate), float(inverse_root)};
    updates.push_back(u);
  }
  for (bool first : {true, false}) {
    o.first = first && o.kind == Optimizer::sgd;
    const auto before = params;
    const std::vector<std::vector<T>> states_before[] = {states[0], states[1], states[2]};
    if (optimize(&o, updates.data(), int64_t(updates.size()), 1)) ++failures;
    for (size_t t = 0; t < params.size(); ++t)
      for (size_t i = 1; i < params[t].size(); ++i) {
        const auto state = [&](int k) { return k < o.states ? double{decode(states_before[k][t][i])} : 0; };
        const double w = decode(before[t][i]), dw = decode(grads[t][i]);
        double g = (o.maximize ? -dw : dw) + o.weight_decay * w;
        if (o.kind == Optimizer::adam) {
          const double m = o.momentum * state(0) + o.undamped * g;
          const double v = o.momentum_square * state(1) + o.undamped_square * g * g;
          const double u = o.states > 2 ? std::max(v, state(2)) : v;
          expect("exp_avg", states[0][t][i], m);
          expect("exp_avg_sq", states[1][t][i], v);
          expect("param", params[t][i], o.kept * w - rate * m / (std::sqrt(u) * inverse_root + o.eps));
          continue;
        }
        if (o.states) {
          const double next = o.first ? g : o.momentum * state(0) + o.undamped * g;
          expect("momentum", states[0][t][i], next);
          g = o.nesterov ? g + o.momentum * next : next;
        }
        expect("param", params[t][i], w - rate * g);
      }
  }
}

// One whose parameters have so many tensors of state, with every number at work.
Optimizer optimizer_with(int states, Dtype dtype = Dtype::float32) {
  return {.kind = states > 1 ? Optimizer::adam : Optimizer::sgd,
          .dtype = dtype,
          .states = states,
          .weight_decay = 0.125f,
          .momentum = 0.75f,
          .undamped = 0.25f,
          .momentum_square = 0.5f,
          .undamped_square = 0.5f,
          .eps = 0.5f,
          .kept = 0.75f,
          .maximize = false,
          .nesterov = states == 1,
          .first = false};
}

template <class T>
void check_optimizers(Dtype dtype) {
  for (int states = 0; states <= most_states; ++states)
    for (const bool maximize : {false, true})
      for (const bool nesterov : {false, true}) {
        Optimizer o = optimizer_with(states, dtype);
        o.maximize = maximize, o.nesterov = nesterov;
        check_optimizer<T>(o);
      }
}

// Of gradients that begin at any address, to a quarter of their norm and to more than it.
template <class T>
void check_clip(Dtype dtype) {
  std::vector<std::vector<T>> grads;
  double sum = 0;
  for (int64_t size : {0, 1, 3, 17, 64, 1000, 9000}) grads.push_back(wave<T>(size + 1, 1));
  for (const auto& grad : grads)
    for (size_t i = 1; i < grad.size(); ++i) sum += double{decode(grad[i])} * decode(grad[i]);
  for (const double factor : {0.25, 4.0}) {
    auto clipped = grads;
    std::vector<Gradient> gradients;
    for (auto& grad : clipped) gradients.push_back({grad.data() + 1, int64_t(grad.size()) - 1});
    T norm;
    const Clip c{dtype, factor * std::sqrt(sum), false, &norm};
    const int64_t count = int64_t(gradients.size());
    std::vector<double> workspace(clip_workspace(&c, gradients.data(), count) / sizeof(double));
    if (clip(&c, gradients.data(), count, workspace.data(), 1)) ++failures;
    expect("norm", norm, std::sqrt(sum));
    for (size_t t = 0; t < grads.size(); ++t)
      for (size_t i = 1; i < grads[t].size(); ++i)
        expect("clipped", clipped[t][i], std::min(factor, 1.0) * decode(grads[t][i]));
  }
}

#ifndef FASTMLP_EMULATE
// Of a network of L layers: one that has z read between others, and a last one.
Activation activations_of(int64_t layer, int64_t L) {
  if (layer + 1 == L) return {L == 1 ? Activation::identity : Activation::silu};
  return {layer % 2 ? Activation::silu : Activation::tanh};
}

// A step against its parts: the same forward, loss, backward and update one after the other.
void check_step(int64_t M, std::vector<int64_t> sizes, Loss loss, int states, int threads,
                bool weighted = false, double max_norm = 0) {
  const int64_t L = int64_t(sizes.size()) - 1, C = sizes.back();
  const Optimizer optimizer = optimizer_with(states);
  const auto update_of = [&](std::vector<float>* p, const float* grad) {
    Update u{p[0].data(), grad, {}, int64_t(p[0].size()), {{0.5f, 2}}};
    for (int k = 0; k < states; ++k) u.states[k] = p[1 + k].data();
    return u;
  };
  const auto x = wave<float>(M * sizes[0], 1), target = wave<float>(M * C, 2);
  std::vector<int64_t> classes(M);
  for (int64_t i = 0; i < M; ++i) classes[i] = i % 5 == 4 ? -100 : i * 7 % C;
  struct Parameters {
    std::vector<float> weight[1 + most_states], bias[1 + most_states];  // and their states
  };
  std::vector<Parameters> parameters, want;
  for (int64_t i = 0; i < L; ++i) {
    const int64_t N = sizes[i + 1], K = sizes[i];
    Parameters& p = parameters.emplace_back();
    for (int k = 0; k <= states; ++k) {
      p.weight[k] = wave<float>(N * K, 3 + 2 * k), p.bias[k] = wave<float>(N, 4 + 2 * k);
      for (float& value : p.weight[k]) value = k > 1 ? std::abs(value) : value;  // a mean of squares
      for (float& value : p.bias[k]) value = k > 1 ? std::abs(value) : value;
    }
  }
  want = parameters;
  const CrossEntropy entropy{
      Dtype::float32, Reduction::mean, M, C, nullptr, classes.data(), nullptr, -100, 0.1f, nullptr, nullptr};

  std::vector<Forward> forwards, open;
  std::vector<std::vector<float>> y(L), z(L);
  std::vector<Trained> weights, biases;
  for (int64_t i = 0; i < L; ++i) {
    y[i].resize(M * sizes[i + 1]);
    z[i].resize(y[i].size());
    const Activation g = activations_of(i, L);
    forwards.push_back({.dtype = Dtype::float32,
                        .reduced = false,
                        .activation = g,
                        .M = M,
                        .N = sizes[i + 1],
                        .K = sizes[i],
                        .x = i ? y[i - 1].data() : x.data(),
                        .ldx = sizes[i],
                        .weight = want[i].weight->data(),
                        .ldw = sizes[i],
                        .bias = want[i].bias->data(),
                        .y = y[i].data(),
                        .z = reads(g) == Reads::z ? z[i].data() : nullptr});
    open.push_back(forwards.back());
    if (loss != Loss::given) open.back().x = i ? nullptr : x.data(), open.back().y = open.back().z = nullptr;
    open.back().weight = parameters[i].weight->data(), open.back().bias = parameters[i].bias->data();
    Parameters& p = parameters[i];
    weights.push_back({&optimizer, update_of(p.weight, nullptr)});
    biases.push_back({&optimizer, update_of(p.bias, nullptr)});
  }
  cpu::forward(forwards.data(), L, nullptr, 1);
  float value = 0, norm = 0;
  const auto weight = wave<float>(C, 7), pos_weight = wave<float>(C, 8);
  const Pointwise pointwise{
      C,     target.data(), weighted ? weight.data() : nullptr, weighted ? pos_weight.data() : nullptr,
      0.75f, true};
  const Step step{.count = L,
                  .layers = open.data(),
                  .weights = weights.data(),
                  .biases = biases.data(),
                  .loss = loss,
                  .cross_entropy = entropy,
                  .pointwise = pointwise,
                  .gradient = target.data(),
                  .value = &value,
                  .max_norm = max_norm,
                  .norm = &norm};
  omp_set_num_threads(threads);
  std::vector<char> workspace(cpu::train_workspace(step, threads));
  if (cpu::train(step, workspace.data(), threads) != -1) ++failures;

  std::vector<float> grad(M * C), expected(1);
  const auto& output = y.back();
  double sum = 0;
  for (int64_t i = 0; i < M * C; ++i) {
    const double t = target[i], d = output[i] - t, n = double(M * C), e = std::exp(-double{output[i]});
    const double w = weighted ? weight[i % C] : 1, p = weighted ? pos_weight[i % C] : 1;
    const double size = std::abs(d), sign = d > 0 ? 1 : d < 0 ? -1 : 0, bound = pointwise.bound;
    const bool inside = size < bound;
    double of_element = w * (p * t * std::log1p(e) + (1 - t) * std::log1p(1 / e));
    double slope = w * ((1 - t) - p * t * e) / (1 + e);
    if (loss == Loss::mse) of_element = d * d, slope = 2 * d;
    if (loss == Loss::l1) of_element = size, slope = sign;
    if (loss == Loss::smooth_l1)
      of_element = inside ? d * d / (2 * bound) : size - bound / 2, slope = inside ? d / bound : sign;
    if (loss == Loss::huber)
      of_element = inside ? d * d / 2 : bound * (size - bound / 2), slope = inside ? d : bound * sign;
    sum += of_element / n;
    grad[i] = float(slope / n);
  }
  if (loss == Loss::given) sum = 0, grad = target;
  expected[0] = float(sum);
  if (loss == Loss::cross_entropy) {
    CrossEntropy p = entropy;
    p.input = output.data(), p.loss = expected.data(), p.grad = grad.data();
    std::vector<char> own(cpu::cross_entropy_workspace(p));
    cpu::cross_entropy(p, own.data(), 1);
  }
  expect("value", value, expected[0]);
  std::vector<std::vector<float>> grad_weights(L), grad_biases(L);
  std::vector<Gradient> gradients;
  for (int64_t i = L - 1; i >= 0; --i) {
    const int64_t N = sizes[i + 1], K = sizes[i];
    std::vector<float> grad_x(M * K);
    grad_weights[i].resize(N * K), grad_biases[i].resize(N);
    const Backward b{.dtype = Dtype::float32,
                     .reduced = false,
                     .activation = forwards[i].activation,
                     .M = M,
                     .N = N,
                     .K = K,
                     .grad_y = grad.data(),
                     .saved = forwards[i].z ? z[i].data() : y[i].data(),
                     .x = forwards[i].x,
                     .ldx = K,
                     .weight = want[i].weight->data(),
                     .ldw = K,
                     .grad_x = grad_x.data(),
                     .grad_weight = grad_weights[i].data(),
                     .grad_bias = grad_biases[i].data()};
    std::vector<char> own(cpu::backward_workspace(&b, 1, 1));
    cpu::backward(&b, 1, own.data(), 1);
    gradients.push_back({grad_weights[i].data(), N * K});
    gradients.push_back({grad_biases[i].data(), N});
    grad = grad_x;
  }
  if (max_norm > 0) {
    float right = 0;
    cpu::clip({Dtype::float32, max_norm, false, &right}, gradients.data(), int64_t(gradients.size()), 1);
    expect("norm", norm, right);
  }
  for (int64_t i = 0; i < L; ++i) {
    Parameters& p = want[i];
    const Update updates[] = {update_of(p.weight, grad_weights[i].data()),
                              update_of(p.bias, grad_biases[i].data())};
    cpu::optimize(optimizer, updates, 2, 1);
    for (int k = 0; k <= states; ++k) {
      for (size_t e = 0; e < p.weight[k].size(); ++e)
        expect("weight", parameters[i].weight[k][e], p.weight[k][e]);
      for (size_t e = 0; e < p.bias[k].size(); ++e) expect("bias", parameters[i].bias[k][e], p.bias[k][e]);
    }
  }
}
#endif

}  // namespace

int main(int, char** arguments) {
  if (!use(arguments[1])) return 2;
  const int64_t shapes[][3] = {{1, 1, 1}, {3, 5, 7}, {65, 67, 33}, {64, 64, 16}, {2, 70, 17}, {0, 4, 3},
                               {4, 0, 3}, {4, 3, 0}, {300, 33, 1}, {1, 33, 100}, {1030, 9, 5}};
  for (const auto& [M, N, K] : shapes)
    for (const Activation::Kind kind : kinds) {
      const Activation g{kind, {0.75f, kind == Activation::elu ? 1.0f : 6.0f, 1.25f}};
      check<float>(Dtype::float32, g, M, N, K);
      check<__nv_bfloat16>(Dtype::bfloat16, g, M, N, K);
#ifdef FASTMLP_EMULATE
      check<__half>(Dtype::float16, g, M, N, K);
#endif
    }
  for (const auto& [N, C] : {std::pair{0, 3}, {1, 1}, {7, 2}, {9, 10}, {5, 16}, {5, 17}, {3, 300}, {1300, 5}})
    for (const bool weighted : {false, true})
      for (const float smoothing : {0.0f, 0.1f}) {
        check_cross_entropy<float>(Dtype::float32, N, C, weighted, smoothing);
        check_cross_entropy<__nv_bfloat16>(Dtype::bfloat16, N, C, weighted, smoothing);
#ifdef FASTMLP_EMULATE
        check_cross_entropy<__half>(Dtype::float16, N, C, weighted, smoothing);
#endif
      }
  check_optimizers<float>(Dtype::float32);
  check_optimizers<__nv_bfloat16>(Dtype::bfloat16);
  check_clip<float>(Dtype::float32);
  check_clip<__nv_bfloat16>(Dtype::bfloat16);
#ifdef FASTMLP_EMULATE
  check_optimizers<__half>(Dtype::float16);
  check_clip<__half>(Dtype::float16);
#endif
#ifndef FASTMLP_EMULATE
  for (const Loss loss : {Loss::l1, Loss::smooth_l1, Loss::huber, Loss::given})
    for (const int64_t M : {1, 20, 1030}) check_step(M, {9, 33, 5}, loss, 1, 3);
  for (const double max_norm : {0.01, 1e9})
    for (const int64_t M : {20, 1030}) check_step(M, {9, 33, 5}, Loss::mse, 2, 3, false, max_norm);
  for (const Loss loss : {Loss::cross_entropy, Loss::mse, Loss::bce_with_logits})
    for (const int states : {0, 1, 2, 3})
      for (const int64_t M : {1, 20, 300, 1030})
        for (const int threads : {1, 3}) check_step(M, {9, 33, 20, 5}, loss, states, threads);
  check_step(300, {300, 450, 5}, Loss::cross_entropy, 3, 2);
  for (const int64_t C : {1, 5, 16, 37})  // beside registers of 4 to 16
    for (const int64_t M : {1, 20, 1030}) check_step(M, {9, C}, Loss::bce_with_logits, 0, 3, true);
#endif
  std::printf("%d failures\n", failures);
  return failures != 0;
}
