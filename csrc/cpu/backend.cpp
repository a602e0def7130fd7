// The CPU backend: chooses the instruction set.
#include "backend.h"

#include <pthread.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>

#include "../optimizer.h"
#include "plan.h"

namespace fastmlp::cpu {
namespace {

struct InstructionSet {
  const char* name;
  const Kernels* kernels;  // null where the processor lacks it
};

// The tests emulate what their processor lacks: see avx512_emulator.h.
#ifndef FASTMLP_EMULATE_AVX512
#define FASTMLP_EMULATE_AVX512 0
#endif
#ifndef FASTMLP_EMULATE_AVX512BF16
#define FASTMLP_EMULATE_AVX512BF16 0
#endif

const InstructionSet* find(const char* name) {
#ifdef __x86_64__
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool has_avx512 =
      FASTMLP_EMULATE_AVX512 || (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"));
  static const bool has_pairs =
      FASTMLP_EMULATE_AVX512BF16 || (has_avx512 && __builtin_cpu_supports("avx512bf16"));
  static const InstructionSet sets[] = {{instruction_sets[0], has_pairs ? &avx512bf16_kernels : nullptr},
                                        {instruction_sets[1], has_avx512 ? &avx512_kernels : nullptr},
                                        {instruction_sets[2], has_avx2 ? &avx2_kernels : nullptr},
                                        {instruction_sets[3], &portable_kernels}};
#else
  static const InstructionSet sets[] = {{instruction_sets[3], &portable_kernels}};
#endif
  for (const InstructionSet& set : sets)
    if (set.kernels && (!name || !std::strcmp(name, set.name))) return &set;
  return nullptr;
}

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set{find(nullptr)};
  return set;
}

std::atomic<bool> asked_for{false};  // by use()

std::atomic<bool> forked{false};
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool is_forked() { return forked; }

const Kernels& kernels() { return *chosen().load()->kernels; }

const char* instruction_set() { return chosen().load()->name; }

bool supports(const char* instruction_set) { return find(instruction_set); }

bool use(const char* instruction_set) {
  const InstructionSet* set = find(instruction_set);
  if (set) chosen() = set, asked_for = true;
  return set;
}

bool covers(Dtype dtype) {
#ifdef __x86_64__
  static const bool has_tiles = __builtin_cpu_supports("amx-bf16");
  if (dtype == Dtype::bfloat16) return !has_tiles || asked_for;
#endif
  return dtype != Dtype::float16;
}

void optimize(const Optimizer& o, const Update* updates, int64_t count, int threads) {
  constexpr double cost = 8;  // of an element, in multiply-adds: what reading it takes
  const Kernels& k = kernels();
  const Lines<Update> lines{updates, count, cache_line / size_of(o.dtype)};
  const int64_t total = lines.total();
  share(threads, cost * double(total * lines.length), 0, [&](int rank, int size) {
    lines.visit(part(total, 1, rank, size), [&](const Update& u, Range range) { k.update(o, u, range); });
  });
}

// The sum is one of up to 128 parts, whose number and bounds the sizes alone decide.
void clip(const Clip& c, const Gradient* gradients, int64_t count, int threads) {
  constexpr double cost = 8;
  constexpr int most_parts = 128, least_lines = 256;  // of a part
  const Kernels& k = kernels();
  const Lines<Gradient> lines{gradients, count, cache_line / size_of(c.dtype)};
  const int64_t total = lines.total();
  const int parts = int(std::clamp<int64_t>(total / least_lines, 1, most_parts));
  // From this on a norm is rounded to infinity.
  const double infinity = c.dtype == Dtype::float32 ? 0x1.ffffffp127 : 0x1.ffp127;
  double sums[most_parts] = {};
  share(threads, cost * double(total * lines.length), 1, [&](int rank, int size) {
    const Range own = part(parts, 1, rank, size);
    for (int64_t p = own.begin; p < own.end; ++p)
      lines.visit(part(total, 1, int(p), parts),
                  [&](const Gradient& g, Range range) { sums[p] += k.sum_of_squares(c.dtype, g, range); });
    wait(size);
    const double norm = std::sqrt(std::accumulate(sums, sums + parts, 0.0));
    const float stored = float(norm), factor = factor_of(c, norm, norm < infinity);
    if (rank == 0) k.add_up(&stored, 1, 0, c.dtype, c.norm, {0, 1});
    if (factor == 1) return;
    const auto begin = [&](int64_t p) { return part(total, 1, int(p), parts).begin; };
    lines.visit({begin(own.begin), begin(own.end)},
                [&](const Gradient& g, Range range) { k.scale(c.dtype, g, factor, range); });
  });
}

void gather(const void* from, const int64_t* rows, int64_t count, int64_t bytes, void* to, int threads) {
  constexpr double cost = 4;  // of a byte, in multiply-adds: what copying it from another cache takes
  share(threads, cost * double(count * bytes), 0, [&](int rank, int size) {
    const Range own = part(count, 1, rank, size);
    for (int64_t i = own.begin; i < own.end; ++i)
      std::memcpy(static_cast<char*>(to) + i * bytes, static_cast<const char*>(from) + rows[i] * bytes,
                  size_t(bytes));
  });
}

}  // namespace fastmlp::cpu
