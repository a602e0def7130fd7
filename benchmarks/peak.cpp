// The machine's own ceilings: multiply-adds in registers, on every thread at once, with nothing else to wait for; and
// reading memory from whichever cache holds it. Compiled for the machine it runs on; called and timed by kernels.py and
// inference.py.
#include <omp.h>

#ifdef __AVX512F__
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif
typedef float V __attribute__((vector_size(lanes * sizeof(float))));

// Each of `threads` threads multiplies and adds `steps` times in every lane of 12 chains, which are more than a
// multiply-add has cycles of latency. Returns the floating-point operations that this was.
extern "C" double multiply_add(int threads, long steps) {
#pragma omp parallel num_threads(threads)
  {
    V sum[12], a = V{} + 1.0f, b = V{} + 1e-9f;
    for (auto& s : sum) s = V{};
    asm volatile("" : "+x"(a), "+x"(b));  // the compiler must not know the values
    for (long i = 0; i < steps; ++i)
#pragma GCC unroll 12
      for (auto& s : sum) s = s * a + b;
    for (auto& s : sum) asm volatile("" ::"x"(s));
  }
  return 12.0 * 2 * lanes * double(steps) * threads;
}

// Each thread adds up its part of the floats, of which there are so many times 8 registers; the rest is left out.
extern "C" void read(int threads, const float* data, long count) {
  constexpr long registers = 8;
  const long blocks = count / (registers * lanes);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const long rank = threads > 1 ? omp_get_thread_num() : 0;
    V sum[registers] = {};
    for (long b = blocks * rank / threads; b < blocks * (rank + 1) / threads; ++b)
#pragma GCC unroll 8
      for (long r = 0; r < registers; ++r) {
        V v;
        __builtin_memcpy(&v, data + (b * registers + r) * lanes, sizeof(V));
        sum[r] += v;
      }
    for (auto& s : sum) asm volatile("" ::"x"(s));
  }
}
