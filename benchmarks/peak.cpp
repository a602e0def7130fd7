// The machine's own ceiling: multiply-adds in registers, on every thread at once, with nothing else to wait for.
// Compiled for the machine it runs on; called by kernels.py.
#include <omp.h>

#ifdef __AVX512F__
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif
typedef float V __attribute__((vector_size(lanes * sizeof(float))));

// Floating-point operations per second of `threads` threads that each do 12 * 2 * lanes * `steps` of them: more
// chains than a multiply-add has cycles of latency.
extern "C" double peak(int threads, long steps) {
  double start = 0, end = 0;
#pragma omp parallel num_threads(threads)
  {
    V sum[12], a = V{} + 1.0f, b = V{} + 1e-9f;
    for (auto& s : sum) s = V{};
    asm volatile("" : "+x"(a), "+x"(b));  // the compiler must not know the values
#pragma omp barrier
#pragma omp master
    start = omp_get_wtime();
    for (long i = 0; i < steps; ++i)
#pragma GCC unroll 12
      for (auto& s : sum) s = s * a + b;
#pragma omp barrier
#pragma omp master
    end = omp_get_wtime();
    for (auto& s : sum) asm volatile("" ::"x"(s));
  }
  return 12.0 * 2 * lanes * double(steps) * threads / (end - start);
}
