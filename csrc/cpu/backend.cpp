// The CPU backend: chooses the instruction set.
#include "backend.h"

#include <pthread.h>

#include <atomic>
#include <cstring>

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

// Threads share the cache lines of all tensors, as if these lay one after the other.
void optimize(const Optimizer& o, const Update* updates, int64_t count, int threads) {
  constexpr double cost = 8;  // of an element, in multiply-adds: what reading it takes
  const Kernels& k = kernels();
  const int64_t line = cache_line / size_of(o.dtype);  // in elements
  int64_t lines = 0;
  for (const Update* u = updates; u != updates + count; ++u) lines += ceil_div(u->size, line);
  share(threads, cost * double(lines * line), [&](int rank, int size) {
    Range mine = part(lines, 1, rank, size);
    for (const Update* u = updates; u != updates + count && mine.end > 0; ++u) {
      const auto bound = [&](int64_t at) { return std::clamp<int64_t>(at * line, 0, u->size); };
      const Range range = {bound(mine.begin), bound(mine.end)};
      if (range.size() > 0) k.update(o, *u, range);
      mine.begin -= ceil_div(u->size, line);
      mine.end -= ceil_div(u->size, line);
    }
  });
}

}  // namespace fastmlp::cpu
