// CUDA's part of the language and of the runtime for plain g++, so that the kernel sources run on the CPU.
//
// Every CUDA thread is a fiber; one block runs at a time, and a fiber runs until it waits for others: at a barrier of
// its block or, in a cooperative launch, of the grid, or at an instruction that a warp executes together. It shows what
// a GPU may hide:
//
//   - shared memory holds NaN before each block, and so does what an asynchronous copy is to fill until the thread
//     that asked for the copy has waited for it;
//   - two threads that touch the same memory, one of them writing, with nothing between that orders them fail the
//     launch, whatever the values are. The compiler reports every access: the sources are compiled by
//     -fsanitize=thread, and what it calls is defined here, in place of its library. Threads of a block are ordered by
//     its barriers; blocks by barriers of the grid, or by an atomic operation
//     of one after its threads have fenced what they wrote, and of the other before it reads that;
//   - a launch that may begin before the one before it has ended touches nothing but its parameters and shared memory
//     until it waits, and all its threads wait. So nothing that they do earlier could be seen by that other launch, nor
//     the other way round, and there is no need to run the two beside each other;
//   - a barrier that the threads of a block do not all reach fails the launch, as does a misaligned row or copy;
//   - a launch fails as on a GPU: of too many threads, parameters or bytes of shared memory, of more than was asked for,
//     of blocks that are not all there at once, of attributes that the GPU does not know, and without code for it;
//   - the accesses of a warp at one instruction are counted together, where that is asked for: the sectors of 32 bytes
//     that they touch in global memory, and how often they wait for a bank of shared memory;
//   - the blocks and the fibers run forward, reversed or shuffled, and a launch more than once, as in a graph.
//
// What went wrong is in emulator::complaint. Not thread-safe.
#pragma once

#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <set>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __CUDACC_VER_MAJOR__ 0
#define __CUDACC_VER_MINOR__ 0
#define __CUDA_ARCH_LIST__ 0
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __builtin_assume(condition)
// Thread-local only to lie in one segment that the emulator can find: all fibers share the host's one thread.
#define __shared__ static thread_local
#define __syncthreads() emulator::synchronize_block(__LINE__)
#define __shfl_xor_sync(mask, value, step) emulator::shuffle_xor(value, step)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

#ifdef FASTMLP_EMULATE  // which a host's files do not see
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
#endif

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidKernelImage = 200,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidPtx = 218,
  cudaErrorJitCompilerNotFound = 221,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorJitCompilationDisabled = 223,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrCooperativeLaunch,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int ptxVersion;
};
using cudaStream_t = struct CUstream_st*;

enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative, programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  const cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

#ifdef __aarch64__  // where g++ has _Float16 in C++ from release 13 on only
using Float16 = __fp16;
#elif __GNUC__ < 12  // which compiles the CPU's kernels alone: they know no float16
using Float16 = float;
#else
using Float16 = _Float16;
#endif

struct __half {
  Float16 value;
};
inline float __half2float(__half h) { return h.value; }
inline __half __float2half_rn(float f) { return {static_cast<Float16>(f)}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 b) {
  const uint32_t bits = uint32_t{b.bits} << 16;
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof(f));
  if (f != f) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

#ifdef FASTMLP_EMULATE

// Below nothing is instrumented: it is what is called at an access.
#define UNSEEN __attribute__((no_sanitize("thread")))

extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start,
    _end;  // the linker's, of this library

namespace emulator {

// The order of blocks, and of fibers between barriers: 0 forward, 1 reversed, else a seed to shuffle by.
inline unsigned order = 0;
inline unsigned times = 1;  // that each launch runs
inline void* result;        // of the launch, which is NaN before it runs again
inline size_t result_bytes;
inline std::vector<int64_t> grids;  // the blocks of each launch so far

inline char complaint[200];

constexpr unsigned lanes = 32, most_threads = 1024;
constexpr size_t stack_bytes = 64 << 10;

// The GPUs that there are: the architecture, that of the code, or 0 where there is none, and the driver's CUDA; what a block
// may have of shared memory where its kernel asks for it, and what each kernel has of it for variables; how many threads
// and blocks a multiprocessor has room for.
struct Device {
  int architecture, code, driver;
  size_t most_shared_bytes, variables_bytes;
  unsigned most_threads, most_blocks;
};
constexpr Device devices[] = {
    {90, 90, 13000, 227 << 10, 0, 2048, 32}, {80, 80, 13000, 163 << 10, 0, 2048, 32},
    {86, 80, 13000, 99 << 10, 0, 1536, 16},  {120, 120, 13000, 99 << 10, 0, 1536, 24},
    {90, 80, 13000, 227 << 10, 0, 2048, 32},  // by way of PTX
    {90, 90, 12020, 227 << 10, 0, 2048, 32}, {86, 80, 13000, 99 << 10, 8 << 10, 1536, 16},
    {75, 0, 13000, 64 << 10, 0, 1024, 16}};
constexpr size_t granted_bytes = 48 << 10;        // to a kernel that does not ask
constexpr size_t most_parameter_bytes = 4 << 10;  // before CUDA 12.1; and more, later, only from sm_70 on
constexpr size_t reserved_bytes = 1 << 10;        // of shared memory, for each block
inline int device;                                // the current one
inline int multiprocessors = 8;                   // of each
inline cudaError_t last_error;
inline std::map<std::pair<int, const void*>, size_t> dynamic_bytes;  // that kernels have asked for, by device

inline cudaError_t fail(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// What goes wrong first is kept, and fails the launch.
template <class... Values>
void complain(const char* format, Values... values) {
  if (!*complaint) std::snprintf(complaint, sizeof(complaint), format, values...);
}

// ---- fibers

#ifdef __x86_64__
// swapcontext() asks the system for the signal mask each time, which is most of its cost.
asm(R"(
.text
.balign 16
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
extern "C" void emulator_switch(void** from, void* to) asm("emulator_switch");

struct Context {
  void* top;
  void start(void (*entry)(), char* stack) {
    void** frame = reinterpret_cast<void**>(stack + stack_bytes) - 2;  // aligned as a call leaves it
    *frame = reinterpret_cast<void*>(entry);
    top = std::fill_n(frame - 6, 6, nullptr) - 6;
  }
  static void change(Context& from, Context& to) { emulator_switch(&from.top, to.top); }
};
#else
struct Context {
  ucontext_t context;
  void start(void (*entry)(), char* stack) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = stack_bytes;
    makecontext(&context, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

enum class State { ready, at_block_barrier, at_grid_barrier, at_warp_meeting, ended };

// An asynchronous copy.
struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool inside;  // or it becomes 0
  int group;    // of the thread's, as they are committed
};

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  State state;
  int line;               // of the barrier at which it waits
  const char* operation;  // in which it meets the other lanes, and what it brings
  void* argument;
  std::vector<Copy> copies;
  int groups;
  uint32_t fence, unfenced;  // when it fenced last, and when it first wrote to global memory since
  bool has_heard;            // of other blocks, since it last met its own
  bool is_early;             // the launch before may not have ended
};

// Of four bytes of shared memory, which no kernel lets two threads share: who has touched it since a barrier of the block.
struct Cell {
  uint32_t met, filling;  // that barrier, and the one behind which a copy into it began
  uint16_t writer, reader;
  bool several;  // have read
};
struct Region {
  char *begin, *end;
  Cell* cells;
};

// What a block has told others: of what its threads did before `all`, and one of them before `own`.
struct Release {
  uint32_t all, own;
  unsigned thread;
};

// The block that runs. Times are counted by `now`, of all blocks of all launches.
struct Block {
  size_t number;
  std::vector<Fiber> fibers;
  unsigned arrived[most_threads / lanes];  // of each warp's lanes, where it meets
  Region regions[2];                       // of shared memory: statically allocated, and dynamic
  unsigned char* dynamic_memory;
  uint32_t began, met, fenced;  // the last barrier, and when the first write came that was not fenced there
  std::vector<Release> known, heard;  // of each block: when they last met, and since then
};
inline Block own;
inline uint32_t now;

inline Context scheduler;
inline Fiber* running;   // null outside of the kernel
inline unsigned thread;  // of the running fiber
inline unsigned threads_of_block;
inline void (*kernel_call)(void*);  // with the kernel and its arguments, which are so many bytes
inline char* kernel_arguments;
inline size_t kernel_arguments_bytes;
inline thread_local char in_shared_memory;

// While the emulator is at work, which is no access of the kernel's.
inline bool is_inside;
class Inside {
 public:
  UNSEEN Inside() : was_inside(is_inside) { is_inside = true; }
  UNSEEN ~Inside() { is_inside = was_inside; }

 private:
  const bool was_inside;
};

// AddressSanitizer has to know which stack is in use.
inline const void* host_stack;
inline size_t host_stack_bytes;

inline void change(Context& from, Context& to, [[maybe_unused]] const void* stack,
                   [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  void* fake;
  __sanitizer_start_switch_fiber(&fake, stack, bytes);
  Context::change(from, to);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  Context::change(from, to);
#endif
}

inline void suspend(State state) {
  const bool was_inside = std::exchange(is_inside, true);
  running->state = state;
  change(running->context, scheduler, host_stack, host_stack_bytes);
  is_inside = was_inside;
}

inline void resume(unsigned t) {
  const Inside here;
  thread = t;
  running = &own.fibers[t];
  threadIdx = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
  change(scheduler, running->context, running->stack.get(), stack_bytes);
  running = nullptr;
}

inline void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
#endif
  for (;;) {  // a block a turn
    is_inside = false;
    kernel_call(kernel_arguments);
    is_inside = true;
    if (running->is_early) complain("a thread ends that has not waited for the launch before");
    suspend(State::ended);
  }
}

inline void make_fibers(unsigned count) {
  own.fibers = std::vector<Fiber>(count);
  for (Fiber& fiber : own.fibers) {
    fiber.stack.reset(new char[stack_bytes]);
    fiber.context.start(fiber_main, fiber.stack.get());
  }
}

inline void synchronize_block(int line) {
  const Inside here;
  running->line = line;
  suspend(State::at_block_barrier);
}

// The lanes of a warp meet in an operation; the last to arrive does it for all.
template <class Argument, class Operation>
void meet(const char* name, Argument& mine, Operation operation) {
  const Inside here;
  unsigned& arrived = own.arrived[thread / lanes];
  const unsigned first = thread / lanes * lanes, width = std::min(lanes, threads_of_block - first);
  running->operation = name;
  running->argument = &mine;
  if (++arrived < width) return suspend(State::at_warp_meeting);
  arrived = 0;
  Argument* arguments[lanes];
  for (unsigned lane = 0; lane < width; ++lane) {
    Fiber& fiber = own.fibers[first + lane];
    if (std::strcmp(fiber.operation, name)) complain("a warp parts ways: %s and %s", fiber.operation, name);
    arguments[lane] = static_cast<Argument*>(fiber.argument);
    fiber.state = State::ready;
  }
  if (*complaint) suspend(State::ended);
  operation(arguments);
}

template <class V>
V shuffle_xor(V value, unsigned step) {
  struct Argument {
    V mine, other;
    unsigned step;
  } argument{value, value, step};
  meet("__shfl_xor_sync", argument, [](Argument** arguments) {
    const unsigned first = thread / lanes * lanes, width = std::min(lanes, threads_of_block - first);
    for (unsigned lane = 0; lane < width; ++lane)
      arguments[lane]->other = arguments[(lane ^ arguments[lane]->step) % width]->mine;
  });
  return argument.other;
}

// ---- who touched what

UNSEEN inline Cell* cells_at(const void* address) {
  const char* const at = static_cast<const char*>(address);
  for (Region& region : own.regions)
    if (region.begin <= at && at < region.end) return region.cells + (at - region.begin) / 4;
  return nullptr;
}

UNSEEN inline void touch_shared(unsigned who, Cell* cell, size_t bytes, bool writes) {
  constexpr uint16_t none = UINT16_MAX;
  for (Cell* const end = cell + (bytes + 3) / 4; cell != end; ++cell) {
    if (cell->filling >= own.began) complain("thread %u touches what an asynchronous copy still fills", who);
    if (cell->met != own.met) *cell = {own.met, cell->filling, none, none, false};
    if (cell->writer != none && cell->writer != who)
      complain("a race: thread %u touches what thread %u writes", who, +cell->writer);
    const bool other_reads = cell->reader != none && (cell->several || cell->reader != who);
    if (writes && other_reads) complain("a race: thread %u writes what thread %u reads", who, +cell->reader);
    if (writes) cell->writer = uint16_t(who);
    else cell->several = other_reads, cell->reader = uint16_t(who);
  }
}

// A thread's touch, and when it was.
struct Touch {
  uint32_t who, time;  // the first is 1024 times the block's number more than the thread's
};
constexpr uint32_t nobody = UINT32_MAX, never = UINT32_MAX;

// Of two bytes of global memory, which is the least that two threads may have as neighbours: who has written last, and
// the last two blocks to read. Where two addresses meet, the older is forgotten.
struct GlobalCell {
  uintptr_t address;
  uint32_t launch;
  Touch write, reads[2];
};
constexpr size_t global_cells = 1 << 22;
inline GlobalCell* const cells_of_all =
    static_cast<GlobalCell*>(std::calloc(global_cells, sizeof(GlobalCell)));
inline uint32_t launches;

// Whether nothing orders what the thread does behind that.
UNSEEN inline bool races(unsigned who, const Touch& before) {
  const unsigned block = before.who / most_threads, its_thread = before.who % most_threads;
  if (before.who == nobody) return false;
  if (block == own.number) return its_thread != who && before.time >= own.met;
  const std::vector<Release>& releases = own.fibers[who].has_heard ? own.heard : own.known;
  if (releases.empty()) return true;
  const Release& release = releases[block];
  return before.time >= (its_thread == release.thread ? release.own : release.all);
}

UNSEEN inline void touch_global(unsigned who, const void* p, size_t bytes, bool writes) {
  Fiber& fiber = own.fibers[who];
  if (fiber.is_early) complain("thread %u touches memory and has not waited for the launch before", who);
  if (writes && fiber.unfenced == never) fiber.unfenced = now;
  const Touch mine = {uint32_t(own.number) * most_threads + who, now};
  const auto check = [&](const Touch& before, const char* what, const char* its) UNSEEN {
    if (races(who, before))
      complain("a race: block %zu, thread %u %s what block %u, thread %u %s", own.number, who, what,
               before.who / most_threads, before.who % most_threads, its);
  };
  const uintptr_t begin = uintptr_t(p) / 2, end = (uintptr_t(p) + bytes + 1) / 2;
  for (uintptr_t at = begin; at < end; ++at) {
    GlobalCell& cell = cells_of_all[at % global_cells];
    if (cell.address != at || cell.launch != launches)
      cell = {at, launches, {nobody, 0}, {{nobody, 0}, {nobody, 0}}};
    check(cell.write, "touches", "writes");
    if (writes) {
      for (const Touch& read : cell.reads) check(read, "writes", "reads");
      cell.write = mine;
    } else {
      const auto is_own = [&](const Touch& read) UNSEEN { return read.who / most_threads == own.number; };
      const bool first =
          is_own(cell.reads[0]) || (!is_own(cell.reads[1]) && cell.reads[0].time <= cell.reads[1].time);
      cell.reads[first ? 0 : 1] = mine;
    }
  }
}

// What no other thread can see, or none writes: constants, the emulator's own variables.
UNSEEN inline bool is_private(unsigned who, const void* p) {
  const char *const at = static_cast<const char*>(p), *const stack = own.fibers[who].stack.get();
  return (stack <= at && at < stack + stack_bytes) || (&__ehdr_start <= at && at < &_end) ||
         (kernel_arguments <= at && at < kernel_arguments + kernel_arguments_bytes);
}

UNSEEN inline void touch(unsigned who, const void* p, size_t bytes, bool writes) {
  if (Cell* const cell = cells_at(p)) touch_shared(who, cell, bytes, writes);
  else if (!is_private(who, p)) touch_global(who, p, bytes, writes);
}

// ---- how a warp's accesses go together

// An access of a thread: how often it had come by the instruction before puts it beside those of the other lanes.
struct Access {
  const void* instruction;
  uint32_t times, thread;
  uintptr_t address;
  size_t bytes;
};
struct Traffic {
  int64_t global_bytes, global_sectors, shared_requests, shared_waits;
};
inline bool counts_traffic;
inline std::pair<uintptr_t, uintptr_t> traced_data[64];  // global memory that is counted
inline size_t traced_count;

UNSEEN inline bool is_traced(const void* p) {
  const auto* const all = traced_data;
  for (size_t i = 0; i < traced_count; ++i)
    if (all[i].first <= uintptr_t(p) && uintptr_t(p) < all[i].second) return true;
  return false;
}
inline Traffic traffic;
inline std::vector<Access> accesses[2];  // to global and to shared memory
inline std::map<std::pair<unsigned, const void*>, uint32_t> passed;

UNSEEN inline void count_access(const void* instruction, const void* p, size_t bytes, bool is_shared) {
  if (!counts_traffic) return;
  const Inside here;  // what is called here is seen
  accesses[is_shared].push_back({instruction, passed[{thread, instruction}]++, thread, uintptr_t(p), bytes});
}

// Calls f(first, last) for the accesses of each warp at once.
template <class F>
void each_request(std::vector<Access>& all, F f) {
  const auto key = [](const Access& a) { return std::tuple(a.thread / lanes, a.instruction, a.times); };
  std::stable_sort(all.begin(), all.end(), [&](const auto& a, const auto& b) { return key(a) < key(b); });
  for (auto first = all.begin(); first != all.end();) {
    auto last = first;
    while (last != all.end() && key(*last) == key(*first)) ++last;
    f(first, last);
    first = last;
  }
  all.clear();
}

// Of a block that is through. 128 bytes of shared memory go at once: of lanes that ask for 16 bytes, 8.
inline void count_traffic() {
  each_request(accesses[0], [](auto first, auto last) {
    std::set<uintptr_t> bytes, sectors;
    for (; first != last; ++first)
      for (uintptr_t at = first->address; at < first->address + first->bytes; ++at)
        bytes.insert(at), sectors.insert(at / 32);
    traffic.global_bytes += int64_t(bytes.size()), traffic.global_sectors += int64_t(sectors.size());
  });
  each_request(accesses[1], [](auto first, auto last) {
    const unsigned at_once = unsigned(std::min<size_t>(lanes, 128 / std::max<size_t>(first->bytes, 4)));
    while (first != last) {
      const unsigned group = first->thread / at_once;
      std::set<uintptr_t> words[32];
      for (; first != last && first->thread / at_once == group; ++first)
        for (uintptr_t word = first->address / 4; word < (first->address + first->bytes + 3) / 4; ++word)
          words[word % 32].insert(word);
      size_t most = 1;
      for (const auto& of_bank : words) most = std::max(most, of_bank.size());
      ++traffic.shared_requests, traffic.shared_waits += int64_t(most) - 1;
    }
  });
  passed.clear();
}

// ---- between launches and between blocks

inline std::vector<Release> releases, at_barrier;  // of each block; and as they were when all had come there
inline uint64_t progress;                          // counts who comes there and who leaves

// What other blocks have told.
inline void hear(const std::vector<Release>& told) {
  own.heard = told;
  running->has_heard = true;
}

UNSEEN inline unsigned arrive(unsigned* arrived, unsigned count) {
  const Inside here;
  releases[own.number] = {own.met, ++now, thread};
  const unsigned before = std::exchange(*arrived, *arrived + count);
  if ((before ^ *arrived) & 0x80000000u) at_barrier = releases;
  ++progress;
  return before;
}

UNSEEN inline void wait(const unsigned* arrived, unsigned before) {
  const Inside here;
  while (!((*arrived ^ before) & 0x80000000u)) suspend(State::at_grid_barrier);
  hear(at_barrier);
  ++progress;
}

// Of an atomic operation: others learn by it what is fenced.
inline void tell() {
  const bool has_fenced = running->fence > own.met;  // for all
  releases[own.number] = {has_fenced ? own.met : own.fenced, std::min(running->unfenced, ++now), thread};
  hear(releases);
}

inline void set_region(Region& region, void* begin, size_t bytes) {
  delete[] region.cells;
  region = {};  // what follows is seen too, and its memory may be what was the region
  region = {static_cast<char*>(begin), static_cast<char*>(begin) + bytes, new Cell[bytes / 4 + 1]()};
}

inline void find_memory() {
  in_shared_memory = 0;  // allocates the segment if nothing has yet
  dl_iterate_phdr(
      [](dl_phdr_info* module, size_t, void*) {
        char* const begin = static_cast<char*>(module->dlpi_tls_data);
        for (int i = 0; i < module->dlpi_phnum; ++i) {
          const auto& segment = module->dlpi_phdr[i];
          const bool ours =
              begin && begin <= &in_shared_memory && &in_shared_memory < begin + segment.p_memsz;
          if (segment.p_type == PT_TLS && ours) set_region(own.regions[0], begin, segment.p_memsz);
        }
        return 0;
      },
      nullptr);
}

// ---- asynchronous copies

inline void set_filling(const Copy& copy, uint32_t epoch) {
  Cell* const cells = cells_at(copy.to);
  for (int i = 0; cells && i < copy.bytes / 4; ++i) cells[i].filling = epoch;
}

template <int bytes>
void copy_async(void* to, const void* from, bool inside) {
  const Inside here;
  const auto misaligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes != 0; };
  if (misaligned(to) || (inside && misaligned(from))) complain("a copy of %d bytes is misaligned", bytes);
  touch(thread, to, bytes, true);
  if (inside) touch(thread, from, bytes, false);
  static const char global = 0, shared = 0;
  count_access(&shared, to, bytes, true);
  if (inside && is_traced(from)) count_access(&global, from, bytes, false);
  std::memset(to, 0xff, bytes);
  running->copies.push_back({to, from, bytes, inside, running->groups});
  set_filling(running->copies.back(), own.met);
}

UNSEEN inline void commit_copies() { ++running->groups; }

// Until all of the thread's groups but the last `left` have arrived.
template <int left>
void wait_for_copies() {
  const Inside here;
  auto& copies = running->copies;
  const auto arrived = [](const Copy& copy) { return copy.group < running->groups - left; };
  for (const Copy& copy : copies) {
    if (!arrived(copy)) continue;
    set_filling(copy, 0);
    touch(thread, copy.to, copy.bytes, true);
    if (copy.inside) touch(thread, copy.from, copy.bytes, false);
    std::memset(copy.to, 0, copy.bytes);
    if (copy.inside) std::memcpy(copy.to, copy.from, copy.bytes);
  }
  copies.erase(std::remove_if(copies.begin(), copies.end(), arrived), copies.end());
}

}  // namespace emulator

inline void __threadfence() {
  const emulator::Inside here;
  emulator::running->fence = ++emulator::now;
  emulator::running->unfenced = emulator::never;
}
UNSEEN inline unsigned long long atomicCAS(unsigned long long* p, unsigned long long expected,
                                           unsigned long long wanted) {
  const emulator::Inside here;
  emulator::tell();
  const unsigned long long found = *p;
  if (found == expected) *p = wanted;
  return found;
}
inline void cudaGridDependencySynchronize() {  // is not there in older code
  const emulator::Inside here;
  if (emulator::devices[emulator::device].code >= 90) emulator::running->is_early = false;
}
inline void cudaTriggerProgrammaticLaunchCompletion() {}
template <class T>
T __ldcg(const T* p) {
  return *p;
}

namespace emulator {

// ---- tensor cores: the layouts are those of the PTX manual, section "Matrix multiply-accumulate operation"

// ldmatrix.x4: lane 8 i + j names the row j of matrix i, which has 8 elements of 16 bits.
template <bool transposed>
void load_matrices(uint32_t (&registers)[4], const void* row) {
  struct Argument {
    uint32_t* registers;
    const void* row;
  } mine{registers, row};
  static const char shared = 0;
  count_access(&shared, row, 16, true);
  meet("ldmatrix", mine, [](Argument** arguments) {
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
      uint16_t elements[8][8];
      for (unsigned j = 0; j < 8; ++j) {
        const unsigned lane = matrix * 8 + j;
        const void* const from = arguments[lane]->row;
        if (reinterpret_cast<uintptr_t>(from) % 16) complain("a row of a matrix is misaligned");
        touch(thread / lanes * lanes + lane, from, 16, false);
        std::memcpy(elements[j], from, 16);
      }
      for (unsigned lane = 0; lane < lanes; ++lane) {
        const unsigned i = lane / 4, j = lane % 4 * 2;
        const uint32_t low = transposed ? elements[j][i] : elements[i][j];
        const uint32_t high = transposed ? elements[j + 1][i] : elements[i][j + 1];
        arguments[lane]->registers[matrix] = low | high << 16;
      }
    }
  });
}

template <class T>
float element(uint32_t bits, unsigned half) {
  if constexpr (std::is_same_v<T, float>) {
    bits &= 0xffffe000;  // of tf32 the rest is not there
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  } else {
    const uint16_t own = uint16_t(bits >> 16 * half);
    T value;
    std::memcpy(&value, &own, sizeof(value));
    if constexpr (std::is_same_v<T, __half>) return __half2float(value);
    else return __bfloat162float(value);
  }
}

// cvt.rna.tf32: to 10 bits of mantissa, halves away from 0.
inline uint32_t round_to_tf32(uint32_t bits) {
  const bool finite = (bits & 0x7f800000) != 0x7f800000;
  return (finite ? bits + 0x1000 : bits) & 0xffffe000;
}

// mma.sync.m16n8k16 of 16 bits, m16n8k8 of tf32: sums += a b.
template <class T>
void multiply_matrices(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Argument {
    float* sums;
    const uint32_t *a, *b;
  } mine{sums, a, b};
  meet("mma", mine, [](Argument** arguments) {
    constexpr unsigned packed = 4 / sizeof(T), depth = 8 * packed;
    float left[16][depth], right[depth][8];
    for (unsigned lane = 0; lane < lanes; ++lane)
      for (unsigned r = 0; r < 4; ++r)
        for (unsigned half = 0; half < packed; ++half) {
          const unsigned group = lane / 4, k = lane % 4 * packed + half;
          left[group + r % 2 * 8][k + r / 2 * 4 * packed] = element<T>(arguments[lane]->a[r], half);
          if (r < 2) right[k + r * 4 * packed][group] = element<T>(arguments[lane]->b[r], half);
        }
    for (unsigned lane = 0; lane < lanes; ++lane)
      for (unsigned r = 0; r < 4; ++r)
        for (unsigned k = 0; k < depth; ++k)
          arguments[lane]->sums[r] += left[lane / 4 + r / 2 * 8][k] * right[k][lane % 4 * 2 + r % 2];
  });
}

// ---- blocks

// The order in which so many fibers, or blocks, run.
class Turn {
 public:
  explicit Turn(unsigned count) : random(order), numbers(count) {
    std::iota(numbers.begin(), numbers.end(), 0);
    if (order == 1) std::reverse(numbers.begin(), numbers.end());
  }
  const std::vector<unsigned>& next() {
    if (order > 1) std::shuffle(numbers.begin(), numbers.end(), random);
    return numbers;
  }

 private:
  std::mt19937 random;
  std::vector<unsigned> numbers;
};

inline void start_block(unsigned threads, bool is_early) {
  threads_of_block = threads;
  own.began = own.met = own.fenced = ++now;
  own.known.clear();
  for (Region& region : own.regions) std::memset(region.begin, 0xff, region.end - region.begin);
  for (Fiber& fiber : own.fibers) {
    fiber.state = State::ready;
    fiber.copies.clear();
    fiber.groups = 0, fiber.fence = 0, fiber.unfenced = never;
    fiber.has_heard = false, fiber.is_early = is_early;
  }
}

enum class Outcome { ended, waits, wrong };

// Runs all threads of the block to their end, or until one waits for other blocks.
inline Outcome run_block(unsigned threads, Turn& turn) {
  const auto all = [&](auto condition) {
    return std::all_of(own.fibers.begin(), own.fibers.begin() + threads, condition);
  };
  for (;;) {
    const std::vector<unsigned>& numbers = turn.next();
    for (bool moves = true; moves;) {
      moves = false;
      for (unsigned t : numbers) {
        if (own.fibers[t].state != State::ready) continue;
        moves = true;
        resume(t);
        if (*complaint) return Outcome::wrong;
      }
    }
    if (all([](const Fiber& fiber) { return fiber.state == State::ended; })) return Outcome::ended;
    if (!all([](const Fiber& fiber) { return fiber.state != State::at_grid_barrier; })) return Outcome::waits;
    if (!all([](const Fiber& fiber) {
          return fiber.state == State::at_block_barrier && fiber.line == own.fibers[0].line;
        })) {
      complain("the threads of a block part ways");
      return Outcome::wrong;
    }
    own.met = own.fenced = ++now;
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = own.fibers[t];
      own.fenced = std::min(own.fenced, fiber.unfenced);
      if (std::exchange(fiber.has_heard, false)) own.known = own.heard;
      fiber.state = State::ready;
    }
  }
}

// Of the exact size, so that AddressSanitizer sees its end.
constexpr std::align_val_t alignment{128};
inline void make_dynamic_memory(size_t bytes) {
  operator delete(own.dynamic_memory, alignment);
  own.dynamic_memory = static_cast<unsigned char*>(operator new(bytes, alignment));
  set_region(own.regions[1], own.dynamic_memory, bytes);
}

inline void run_of_grid(uint64_t number) {
  own.number = number;
  blockIdx = dim3(number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y);
}

// A block of a cooperative launch while it does not run.
class Waiting {
 public:
  Waiting(unsigned threads, size_t dynamic_bytes)
      : turn(threads), variables(own.regions[0].end - own.regions[0].begin) {
    exchange();
    make_fibers(threads);
    set_region(own.regions[0], block.regions[0].begin, variables.size());
    make_dynamic_memory(dynamic_bytes);
    start_block(threads, false);
    exchange();
  }
  ~Waiting() {
    operator delete(block.dynamic_memory, alignment);
    for (Region& region : block.regions) delete[] region.cells;
  }
  // Runs it until it waits for others.
  Outcome run(unsigned threads, unsigned number) {
    exchange();
    run_of_grid(number);
    for (Fiber& fiber : own.fibers)
      if (fiber.state == State::at_grid_barrier) fiber.state = State::ready;
    outcome = run_block(threads, turn);
    exchange();
    return outcome;
  }
  Outcome outcome = Outcome::waits;

 private:
  void exchange() {
    const std::vector<char> theirs(own.regions[0].begin,
                                   own.regions[0].end);  // memcpy is no access that is seen
    std::memcpy(own.regions[0].begin, variables.data(), variables.size());
    std::memcpy(variables.data(), theirs.data(), theirs.size());
    std::swap(own, block);
  }

  Turn turn;
  Block block{};
  std::vector<char> variables;  // what is shared of static storage
};

// False where something goes wrong.
inline bool run_together(unsigned threads, unsigned blocks, size_t dynamic_bytes) {
  std::vector<std::unique_ptr<Waiting>> waiting;
  while (waiting.size() < blocks) waiting.push_back(std::make_unique<Waiting>(threads, dynamic_bytes));
  Turn turn(blocks);
  for (unsigned left = blocks; left > 0 && !*complaint;) {
    const uint64_t before = progress;
    for (unsigned number : turn.next()) {
      if (waiting[number]->outcome == Outcome::ended) continue;
      if (waiting[number]->run(threads, number) == Outcome::ended) --left, ++progress;
      if (*complaint) break;
    }
    if (progress == before) complain("the blocks of a grid wait for one another");
  }
  return !*complaint;
}

UNSEEN inline void access(const void* instruction, const void* p, size_t bytes, bool writes) {
  if (!running || is_inside) return;
  const Inside here;
  touch(thread, p, bytes, writes);
  if (counts_traffic && (cells_at(p) || is_traced(p))) count_access(instruction, p, bytes, cells_at(p));
}

}  // namespace emulator

// What -fsanitize=thread calls at every access to memory.
extern "C" {
#define FASTMLP_ACCESS(name, bytes, writes)                               \
  __attribute__((weak, used)) UNSEEN void __tsan_##name##bytes(void* p) { \
    emulator::access(__builtin_return_address(0), p, bytes, writes);      \
  }
#define FASTMLP_ACCESSES(bytes)                \
  FASTMLP_ACCESS(read, bytes, false)           \
  FASTMLP_ACCESS(unaligned_read, bytes, false) \
  FASTMLP_ACCESS(write, bytes, true) FASTMLP_ACCESS(unaligned_write, bytes, true)
FASTMLP_ACCESSES(1)
FASTMLP_ACCESSES(2)
FASTMLP_ACCESSES(4)
FASTMLP_ACCESSES(8)
FASTMLP_ACCESSES(16)
__attribute__((weak, used)) UNSEEN void __tsan_read_range(void* p, long bytes) {
  emulator::access(__builtin_return_address(0), p, size_t(bytes), false);
}
__attribute__((weak, used)) UNSEEN void __tsan_write_range(void* p, long bytes) {
  emulator::access(__builtin_return_address(0), p, size_t(bytes), true);
}
// Of the host: what kernels share is not atomic.
__attribute__((weak, used)) UNSEEN char __tsan_atomic8_load(const volatile char* p, int) { return *p; }
__attribute__((weak, used)) UNSEEN void __tsan_atomic8_store(volatile char* p, char value, int) {
  *p = value;
}
__attribute__((weak, used)) UNSEEN int __tsan_atomic32_fetch_add(volatile int* p, int value, int) {
  return std::exchange(*const_cast<int*>(p), *p + value);
}
__attribute__((weak, used)) void __tsan_init() {}
__attribute__((weak, used)) void __tsan_func_entry(void*) {}
__attribute__((weak, used)) void __tsan_func_exit(void*) {}
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = emulator::device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= int(std::size(emulator::devices)))
    return emulator::fail(cudaErrorInvalidDevice);
  emulator::device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const emulator::Device& gpu = emulator::devices[device];
  const int values[] = {int(gpu.most_shared_bytes), emulator::multiprocessors, true, gpu.architecture / 10,
                        gpu.architecture % 10};
  *value = values[attribute];  // in the order in which they are declared
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = emulator::devices[emulator::device].driver;
  return cudaSuccess;
}
template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Parameters...)) {
  const emulator::Device& device = emulator::devices[emulator::device];
  if (!device.code) return emulator::fail(cudaErrorNoKernelImageForDevice);
  attributes->sharedSizeBytes = device.variables_bytes;
  attributes->ptxVersion = device.code;
  return cudaSuccess;
}
// Fails for less than there was too, which another thread may be about to launch with.
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  const emulator::Device& device = emulator::devices[emulator::device];
  if (!device.code) return emulator::fail(cudaErrorNoKernelImageForDevice);
  size_t& asked = emulator::dynamic_bytes[{emulator::device, reinterpret_cast<const void*>(kernel)}];
  if (bytes < 0 || size_t(bytes) < asked || size_t(bytes) + device.variables_bytes > device.most_shared_bytes)
    return emulator::fail(cudaErrorInvalidValue);
  asked = size_t(bytes);
  return cudaSuccess;
}

namespace emulator {

// How many blocks a multiprocessor has room for.
inline uint64_t blocks_at_once(const Device& gpu, unsigned threads, size_t dynamic_bytes) {
  const size_t bytes = gpu.variables_bytes + dynamic_bytes + reserved_bytes;
  return std::min({uint64_t{gpu.most_blocks},
                   uint64_t{gpu.most_threads / ((threads + lanes - 1) / lanes * lanes)},
                   uint64_t{(gpu.most_shared_bytes + reserved_bytes) / bytes}});
}

inline cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, size_t parameter_bytes) {
  const Device& gpu = devices[device];
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  const uint64_t count = uint64_t{blockDim.x} * blockDim.y * blockDim.z;
  const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  if (blocks == 0 || count == 0 || count > most_threads || gridDim.x > INT32_MAX || gridDim.y > 65535 ||
      gridDim.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (!gpu.code) return cudaErrorNoKernelImageForDevice;
  const unsigned threads = unsigned(count);
  const size_t bytes = config.dynamicSmemBytes;
  const auto asked = dynamic_bytes.find({device, kernel});
  if (bytes > (asked != dynamic_bytes.end() ? asked->second : granted_bytes - gpu.variables_bytes) ||
      parameter_bytes > most_parameter_bytes)
    return cudaErrorInvalidValue;
  bool is_together = false, is_early = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) is_together = attribute.val.cooperative;
    else if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      is_early = attribute.val.programmaticStreamSerializationAllowed;
    else return cudaErrorInvalidValue;
  }
  // What is said of no older driver and of no cooperative launch is taken for refused.
  if (is_early && (gpu.architecture < 90 || gpu.driver < 12030 || is_together)) return cudaErrorNotSupported;
  if (is_together && blocks > multiprocessors * blocks_at_once(gpu, threads, bytes))
    return cudaErrorCooperativeLaunchTooLarge;

  *complaint = 0;
  if (!own.regions[0].begin) find_memory();
  if (is_together) {
    ++launches;
    releases.assign(blocks, {});
    return run_together(threads, unsigned(blocks), bytes) ? cudaSuccess : cudaErrorLaunchFailure;
  }
  if (own.fibers.size() < threads) make_fibers(threads);
  make_dynamic_memory(bytes);
  grids.push_back(int64_t(blocks));
  Turn turn(static_cast<unsigned>(blocks));
  for (unsigned time = 0; time < times; ++time) {
    ++launches;
    if (time > 0) std::memset(result, 0xff, result_bytes);
    releases.assign(blocks, {});
    for (unsigned number : turn.next()) {
      run_of_grid(number);
      start_block(threads, is_early);
      Turn of_threads(threads);
      if (run_block(threads, of_threads) == Outcome::ended && !*complaint) {
        if (counts_traffic) count_traffic();
        continue;
      }
      if (!*complaint) complain("a block waits for others that are not there");
      own.fibers.clear();  // what they are in the middle of is abandoned
      std::fill(std::begin(own.arrived), std::end(own.arrived), 0);
      return cudaErrorLaunchFailure;
    }
  }
  return cudaSuccess;
}

}  // namespace emulator

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  size_t bytes = 0;
  const auto add = [&](size_t size, size_t alignment) {
    bytes = (bytes + alignment - 1) / alignment * alignment + size;
  };
  (add(sizeof(Parameters), alignof(Parameters)), ...);
  std::pair bound(kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...));
  emulator::kernel_call = [](void* arguments) {
    auto& [function, own] = *static_cast<decltype(bound)*>(arguments);
    std::apply(function, own);
  };
  emulator::kernel_arguments = reinterpret_cast<char*>(&bound);
  emulator::kernel_arguments_bytes = sizeof(bound);
  return emulator::fail(emulator::launch(*config, reinterpret_cast<const void*>(kernel), bytes));
}
#endif
