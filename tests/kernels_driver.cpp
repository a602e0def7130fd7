// A backend without torch: the C functions that test_kernels.py calls, and a program for AddressSanitizer
// that runs every dtype and activation over awkward shapes in buffers of the exact size.
//
// Compiled with FASTMLP_EMULATE for the CUDA backend on the emulator, without for the CPU backend.
#include <omp.h>

#include <cmath>
#include <cstdio>
#include <type_traits>
#include <vector>

#include "../csrc/activation.h"
#include "../csrc/kernels.h"
#include "cuda_emulator.h"

using namespace fastmlp;

// `variant` is what must not change a bit: the order of the emulator's threads, or how many the CPU's are.
[[maybe_unused]] static int threads(unsigned variant) { return int(1 + variant % 7); }

extern "C" {
#ifdef FASTMLP_EMULATE
int use(const char*) { return true; }
int forward(const Forward* layers, int64_t count, void* workspace, unsigned variant) {
  emulator::order = variant;
  return cuda::forward(layers, count, workspace, nullptr);
}
int backward(const Backward* layers, int64_t count, void* workspace, unsigned variant) {
  emulator::order = variant;
  return cuda::backward(layers, count, workspace, nullptr);
}
int64_t forward_workspace(const Forward* layers, int64_t count, unsigned) {
  return cuda::forward_workspace(layers, count);
}
int64_t backward_workspace(const Backward* layers, int64_t count, unsigned) {
  return cuda::backward_workspace(layers, count);
}
#else
int use(const char* instruction_set) { return cpu::use(instruction_set); }
int forward(const Forward* layers, int64_t count, void* workspace, unsigned variant) {
  omp_set_num_threads(threads(variant));
  cpu::forward(layers, count, workspace, threads(variant));
  return 0;
}
int backward(const Backward* layers, int64_t count, void* workspace, unsigned variant) {
  omp_set_num_threads(threads(variant));
  cpu::backward(layers, count, workspace, threads(variant));
  return 0;
}
int64_t forward_workspace(const Forward* layers, int64_t count, unsigned variant) {
  return cpu::forward_workspace(layers, count, threads(variant));
}
int64_t backward_workspace(const Backward* layers, int64_t count, unsigned variant) {
  return cpu::backward_workspace(layers, count, threads(variant));
}
#endif
}

namespace {

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
void expect(const char* what, T got, double want) {
  const double tolerance = std::is_same_v<T, float> ? 1e-5 : 2e-2;
  if (std::abs(decode(got) - want) <= tolerance * (1 + std::abs(want))) return;
  std::printf("%s: got %g, want %g\n", what, decode(got), want);
  ++failures;
}

template <Activation g, class T>
void check(Dtype dtype, int64_t M, int64_t N, int64_t K) {
  const int64_t ldx = K + 3, ldw = K + 5;  // the last row ends with its last element
  const auto x = wave<T>(M && K ? (M - 1) * ldx + K : 0, 1), w = wave<T>(N && K ? (N - 1) * ldw + K : 0, 2);
  const auto bias = wave<T>(N, 3), grad_y = wave<T>(M * N, 4);
  std::vector<T> y(M * N), grad_x(M * K), grad_weight(N * K), grad_bias(N);
  const Forward f{dtype, false, g, M, N, K, x.data(), ldx, w.data(), ldw, bias.data(), y.data()};
  const Backward b{dtype,
                   false,
                   g,
                   M,
                   N,
                   K,
                   grad_y.data(),
                   y.data(),
                   x.data(),
                   ldx,
                   w.data(),
                   ldw,
                   grad_x.data(),
                   grad_weight.data(),
                   grad_bias.data()};
  std::vector<char> workspace(backward_workspace(&b, 1, 1));
  if (forward(&f, 1, nullptr, 1) || backward(&b, 1, workspace.data(), 1)) ++failures;

  std::vector<double> dx(M * K), dw(N * K), db(N);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      double z = decode(bias[n]);
      for (int64_t k = 0; k < K; ++k) z += double{decode(x[m * ldx + k])} * decode(w[n * ldw + k]);
      const double want = g == Activation::relu      ? std::max(z, 0.0)
                          : g == Activation::sigmoid ? 1 / (1 + std::exp(-z))
                          : g == Activation::tanh    ? std::tanh(z)
                                                     : z;
      expect("y", y[m * N + n], want);
      const double dz = activate_backward<g>(decode(grad_y[m * N + n]), decode(y[m * N + n]));
      db[n] += dz;
      for (int64_t k = 0; k < K; ++k) {
        dx[m * K + k] += dz * decode(w[n * ldw + k]);
        dw[n * K + k] += dz * decode(x[m * ldx + k]);
      }
    }
  for (int64_t i = 0; i < M * K; ++i) expect("grad_x", grad_x[i], dx[i]);
  for (int64_t i = 0; i < N * K; ++i) expect("grad_weight", grad_weight[i], dw[i]);
  for (int64_t i = 0; i < N; ++i) expect("grad_bias", grad_bias[i], db[i]);
}

}  // namespace

int main(int, char** arguments) {
  if (!use(arguments[1])) return 2;
  const int64_t shapes[][3] = {{1, 1, 1}, {3, 5, 7}, {65, 67, 33}, {64, 64, 16}, {2, 70, 17}, {0, 4, 3},
                               {4, 0, 3}, {4, 3, 0}, {300, 33, 1}, {1, 33, 100}, {1030, 9, 5}};
  for (const auto& [M, N, K] : shapes)
    for (Activation activation :
         {Activation::identity, Activation::relu, Activation::sigmoid, Activation::tanh})
      with_activation(activation, [M = M, N = N, K = K](auto g) {
        check<decltype(g)::value, float>(Dtype::float32, M, N, K);
        check<decltype(g)::value, __nv_bfloat16>(Dtype::bfloat16, M, N, K);
#ifdef FASTMLP_EMULATE
        check<decltype(g)::value, __half>(Dtype::float16, M, N, K);
#endif
      });
  std::printf("%d failures\n", failures);
  return failures != 0;
}
