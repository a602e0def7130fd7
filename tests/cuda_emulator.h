// CUDA's part of the language and of the runtime for plain g++, so that the kernel sources run on the CPU.
//
// Every CUDA thread is a fiber; one block runs at a time, and a fiber runs until it waits for others: at a barrier of
// its block or, in a cooperative launch, of the grid, or at an instruction that a warp executes together. It shows what
// a GPU may hide:
//
//   - shared memory holds NaN before each block, and so does what an asynchronous copy is to fill until the thread
//     that asked for the copy has waited for it;
//   - two threads that touch the same shared memory, one of them writing, with nothing between that orders them fail
//     the launch, whatever the values are. The compiler reports every access: the sources are compiled by
//     -fsanitize=thread, and what it calls is defined here, in place of its library;
//   - what a block has written to the workspace another block of the launch may read only after the writers have fenced
//     it and met, one of them has told by an atomic operation, and the reader's block has learnt it by one;
//   - so do two blocks of a cooperative launch, or two threads of one, that touch the same memory with no barrier between;
//   - a barrier that the threads of a block do not all reach fails the launch, as does a misaligned row or copy;
//   - a launch fails that has more dynamic shared memory than was asked for, or on a device that there is no code for;
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
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __builtin_assume(condition)
// Thread-local only to lie in one segment that the emulator can find: all fibers share the host's one thread.
#define __shared__ static thread_local
#define __syncthreads() emulator::synchronize_block(__LINE__)
#define __syncwarp() emulator::synchronize_warp(__LINE__)
#define __shfl_xor_sync(mask, value, step) emulator::shuffle_xor(value, step)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
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
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorLaunchFailure = 719
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
};
using cudaStream_t = struct CUstream_st*;

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
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

// The GPUs that there are: what a block may have of shared memory where its kernel asks for it, what each kernel has of
// it for variables, and whether there is code.
struct Device {
  size_t most_shared_bytes, variables_bytes;
  bool has_code;
};
constexpr Device devices[] = {{227 << 10, 0, true},       // sm_90
                              {163 << 10, 0, true},       // sm_80
                              {99 << 10, 0, true},        // sm_86, sm_120
                              {99 << 10, 8 << 10, true},  // the same of kernels with variables
                              {64 << 10, 0, false}};      // sm_75
constexpr size_t granted_bytes = 48 << 10;                // to a kernel that does not ask
inline int device;                                        // the current one
inline int multiprocessors = 8;  // of each, one block of a cooperative launch on each
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

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  State state;
  int line;               // of the barrier at which it waits
  const char* operation;  // in which it meets the other lanes, and what it brings
  void* argument;
};

struct Warp {
  unsigned arrived;
  uint32_t epoch;  // counts its barriers
};

inline std::vector<Fiber> fibers;
inline Warp warps[most_threads / lanes];
inline Context scheduler;
inline Fiber* running;   // null outside of the kernel
inline unsigned thread;  // of the running fiber
inline unsigned threads_of_block;
inline bool is_meeting;             // it does for others what is no access of its own
inline uint32_t block_epoch;        // counts barriers, of all blocks of all launches
inline void (*kernel_call)(void*);  // the kernel with its arguments bound
inline void* kernel_arguments;
inline thread_local char in_shared_memory;
inline unsigned char* dynamic_shared_memory;

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
  running->state = state;
  change(running->context, scheduler, host_stack, host_stack_bytes);
}

inline void resume(unsigned t) {
  thread = t;
  running = &fibers[t];
  threadIdx = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
  change(scheduler, running->context, running->stack.get(), stack_bytes);
  running = nullptr;
}

inline void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
#endif
  for (;;) {  // a block a turn
    kernel_call(kernel_arguments);
    suspend(State::ended);
  }
}

inline void make_fibers(unsigned count) {
  fibers = std::vector<Fiber>(count);
  for (Fiber& fiber : fibers) {
    fiber.stack.reset(new char[stack_bytes]);
    fiber.context.start(fiber_main, fiber.stack.get());
  }
}

inline void synchronize_block(int line) {
  running->line = line;
  suspend(State::at_block_barrier);
}

// The lanes of a warp meet in an operation; the last to arrive does it for all.
template <class Argument, class Operation>
void meet(const char* name, Argument& mine, Operation operation) {
  Warp& warp = warps[thread / lanes];
  const unsigned first = thread / lanes * lanes, width = std::min(lanes, threads_of_block - first);
  running->operation = name;
  running->argument = &mine;
  if (++warp.arrived < width) return suspend(State::at_warp_meeting);
  warp.arrived = 0;
  is_meeting = true;
  Argument* arguments[lanes];
  for (unsigned lane = 0; lane < width; ++lane) {
    Fiber& fiber = fibers[first + lane];
    if (std::strcmp(fiber.operation, name)) complain("a warp parts ways: %s and %s", fiber.operation, name);
    arguments[lane] = static_cast<Argument*>(fiber.argument);
    fiber.state = State::ready;
  }
  if (*complaint) suspend(State::ended);
  operation(arguments);
  is_meeting = false;
}

inline void synchronize_warp(int line) {
  meet("__syncwarp", line, [](int**) { ++warps[thread / lanes].epoch; });
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

// ---- who touched what in shared memory

// Of four bytes, which no kernel lets two threads share. Epochs of the block tell what lies between two of its barriers.
struct Cell {
  uint32_t write_epoch, write_warp_epoch, read_epoch, read_warp_epoch;
  uint16_t writer, reader;
  bool several_lanes, several_warps;  // have read, since the last barrier of the warp, of the block
  uint32_t filling;                   // the epoch in which a copy into it began
};

struct Region {
  char *begin, *end;
  Cell* cells;
};
inline Region regions[2];  // of the statically allocated memory, and the dynamic
inline uint32_t first_epoch_of_block;

UNSEEN inline Cell* cells_at(const void* address) {
  const char* const at = static_cast<const char*>(address);
  for (Region& region : regions)
    if (region.begin <= at && at < region.end) return region.cells + (at - region.begin) / 4;
  return nullptr;
}

// ---- who wrote what in the workspace of a call, which is where blocks leave something for others

inline const char* watched;
inline int64_t watched_bytes;

// What a thread of the running block has fenced, and had fenced when the block last met: counts of its fences.
inline uint32_t fences[most_threads], fences_of_all[most_threads];
// The same of the blocks of a launch, as an atomic operation told it last; and where the running one has had one.
inline std::vector<uint32_t*> told_by;
inline uint32_t** told;  // the same, in calls that are not seen
inline uint32_t heard_epoch;
inline unsigned heard_thread;
inline uint64_t launches;
inline size_t block;  // the running one's number

// Of two bytes, which is the least that two blocks may have as neighbours. A table of those written last.
struct Written {
  uintptr_t address;
  uint64_t launch;
  size_t block;
  uint32_t thread, fences;
};
inline Written written[1 << 20];

UNSEEN inline void touch_global(unsigned who, const void* p, size_t bytes, bool writes) {
  const uintptr_t begin = uintptr_t(p);
  if (p < watched || watched + watched_bytes <= p) return;
  for (uintptr_t at = begin / 2; at < (begin + bytes) / 2; at += writes ? 1 : 2) {
    Written& own = written[at % (sizeof(written) / sizeof(*written))];
    if (own.address == at && own.launch == launches && own.block != block) {
      const bool is_told = told[own.block] && told[own.block][own.thread] > own.fences;
      if (!is_told || !heard_epoch || (heard_epoch == block_epoch && heard_thread != who))
        complain("a race: block %zu touches what block %zu writes", block, own.block);
    }
    if (writes) own = {at, launches, block, who, fences[who]};
  }
}

// An atomic operation of the running thread.
UNSEEN inline void tell() {
  if (!told[block]) told[block] = new uint32_t[most_threads];
  for (unsigned t = 0; t < threads_of_block; ++t) told[block][t] = fences_of_all[t];
  told[block][thread] = fences[thread];
  if (!heard_epoch) heard_epoch = block_epoch, heard_thread = thread;
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
inline bool counts_traffic, in_count;
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
  if (!counts_traffic || in_count) return;
  in_count = true;  // what is called here is seen
  accesses[is_shared].push_back({instruction, passed[{thread, instruction}]++, thread, uintptr_t(p), bytes});
  in_count = false;
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
  in_count = true;
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
  in_count = false;
}

// ---- the blocks of a cooperative launch, and who of them touched what

inline bool is_cooperative;
inline uint32_t arrivals[256], waits[256];  // of each block at barriers of the grid
inline uint64_t progress;                   // counts both

UNSEEN inline unsigned arrive(unsigned* arrived, unsigned count) {
  if (!is_cooperative) complain("a barrier of a grid whose blocks are not all there");
  const unsigned before = *arrived;
  *arrived += count;
  ++arrivals[block], ++progress;
  return before;
}

UNSEEN inline void wait(const unsigned* arrived, unsigned before) {
  while (!((*arrived ^ before) & 0x80000000u)) suspend(State::at_grid_barrier);
  ++waits[block], ++progress;
}

// A thread of a block; how often the block had arrived at barriers of the grid, and which of its own it had passed, when
// the thread touched something.
struct Touch {
  uint16_t block, thread;
  uint32_t arrivals, epoch;
};
constexpr uint16_t nobody = 0xffff;

// Of four bytes: who has written last, and the last two blocks to read. Where two addresses meet, the older is forgotten.
struct GlobalCell {
  uintptr_t address;
  uint64_t launch;
  Touch write, reads[2];
};
constexpr size_t global_cells = 1 << 22;
inline GlobalCell* const cells_of_all =
    static_cast<GlobalCell*>(std::calloc(global_cells, sizeof(GlobalCell)));
inline const char *own_begin, *own_end;  // of the emulator's own variables

// Whether nothing orders what the thread that runs does behind that.
UNSEEN inline bool races(const Touch& before) {
  if (before.block == nobody) return false;
  if (before.block != block) return before.arrivals >= waits[block];
  return before.epoch == block_epoch && before.thread != thread;
}

UNSEEN inline void touch_together(const void* address, size_t bytes, bool writes) {
  const char* at = static_cast<const char*>(address);
  if (own_begin <= at && at < own_end) return;
  const Touch mine = {uint16_t(block), uint16_t(thread), arrivals[block], block_epoch};
  const Touch none = {nobody, 0, 0, 0};
  for (const char* const end = at + bytes; at < end; at += 4) {
    const uintptr_t number = reinterpret_cast<uintptr_t>(at) / 4;
    GlobalCell& cell = cells_of_all[number % global_cells];
    if (cell.address != number || cell.launch != launches) cell = {number, launches, none, {none, none}};
    const auto who = [](const Touch& touch) UNSEEN { return 1000u * touch.block + touch.thread; };
    if (races(cell.write)) complain("a race: %u touches what %u writes", who(mine), who(cell.write));
    if (writes) {
      for (const Touch& read : cell.reads)
        if (races(read)) complain("a race: %u writes what %u reads", who(mine), who(read));
      cell.write = mine;
    } else {
      const bool first = cell.reads[0].block == block ||
                         (cell.reads[1].block != block && cell.reads[0].arrivals <= cell.reads[1].arrivals);
      cell.reads[first ? 0 : 1] = mine;
    }
  }
}

UNSEEN inline void touch(unsigned who, const void* address, size_t bytes, bool writes) {
  Cell* cell = cells_at(address);
  if (!cell) {
    if (!is_cooperative) touch_global(who, address, bytes, writes);
    else if (running && !is_meeting) touch_together(address, bytes, writes);
    return;
  }
  const unsigned warp = who / lanes;
  const uint32_t warp_epoch = warps[warp].epoch;
  for (Cell* const end = cell + (bytes + 3) / 4; cell != end; ++cell) {
    if (cell->filling >= first_epoch_of_block)
      complain("thread %u touches what an asynchronous copy still fills", who);
    const bool after_write = cell->write_epoch != block_epoch || cell->writer == who ||
                             (cell->writer / lanes == warp && cell->write_warp_epoch != warp_epoch);
    if (!after_write) complain("a race: thread %u touches what thread %u writes", who, +cell->writer);
    const bool first_read = cell->read_epoch != block_epoch;
    if (writes) {
      const bool after_reads =
          first_read ||
          (!cell->several_warps && cell->reader / lanes == warp &&
           (cell->read_warp_epoch != warp_epoch || (!cell->several_lanes && cell->reader == who)));
      if (!after_reads) complain("a race: thread %u writes what thread %u reads", who, +cell->reader);
      cell->write_epoch = block_epoch;
      cell->write_warp_epoch = warp_epoch;
      cell->writer = uint16_t(who);
    } else {
      const bool other_warp = !first_read && cell->reader / lanes != warp;
      const bool same_epoch = !first_read && !other_warp && cell->read_warp_epoch == warp_epoch;
      cell->several_warps = !first_read && (cell->several_warps || other_warp);
      cell->several_lanes = same_epoch && (cell->several_lanes || cell->reader != who);
      cell->read_epoch = block_epoch;
      cell->read_warp_epoch = warp_epoch;
      cell->reader = uint16_t(who);
    }
  }
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
          if (segment.p_type == PT_TLS && ours) set_region(regions[0], begin, segment.p_memsz);
          const char* const own = reinterpret_cast<const char*>(module->dlpi_addr + segment.p_vaddr);
          const char* const variable = reinterpret_cast<const char*>(&device);
          if (segment.p_type == PT_LOAD && own <= variable && variable < own + segment.p_memsz)
            own_begin = own, own_end = own + segment.p_memsz;
        }
        return 0;
      },
      nullptr);
}

// ---- asynchronous copies

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool inside;  // or it becomes 0
  int group;    // of the thread's, as they are committed
};
inline std::vector<Copy> copies[most_threads];
inline int groups[most_threads];

inline void set_filling(const Copy& copy, uint32_t epoch) {
  Cell* const cells = cells_at(copy.to);
  for (int i = 0; cells && i < copy.bytes / 4; ++i) cells[i].filling = epoch;
}

template <int bytes>
void copy_async(void* to, const void* from, bool inside) {
  const auto misaligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes != 0; };
  if (misaligned(to) || (inside && misaligned(from))) complain("a copy of %d bytes is misaligned", bytes);
  const Copy copy{to, from, bytes, inside, groups[thread]};
  touch(thread, to, bytes, true);
  static const char global = 0, shared = 0;
  count_access(&shared, to, bytes, true);
  if (inside && is_traced(from)) count_access(&global, from, bytes, false);
  std::memset(to, 0xff, bytes);
  set_filling(copy, block_epoch);
  copies[thread].push_back(copy);
}

inline void commit_copies() { ++groups[thread]; }

// Until all of the thread's groups but the last `left` have arrived.
template <int left>
void wait_for_copies() {
  auto& own = copies[thread];
  const auto arrived = [](const Copy& copy) { return copy.group < groups[thread] - left; };
  for (const Copy& copy : own) {
    if (!arrived(copy)) continue;
    set_filling(copy, 0);
    touch(thread, copy.to, copy.bytes, true);
    if (copy.inside) touch(thread, copy.from, copy.bytes, false);
    std::memset(copy.to, 0, copy.bytes);
    if (copy.inside) std::memcpy(copy.to, copy.from, copy.bytes);
  }
  own.erase(std::remove_if(own.begin(), own.end(), arrived), own.end());
}

// ---- between blocks

}  // namespace emulator

inline void __threadfence() { ++emulator::fences[emulator::thread]; }
UNSEEN inline unsigned long long atomicCAS(unsigned long long* p, unsigned long long expected,
                                           unsigned long long wanted) {
  emulator::tell();
  const unsigned long long found = *p;
  if (found == expected) *p = wanted;
  return found;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}

namespace emulator {

// ---- tensor cores: the layouts are those of the PTX manual, section "Matrix multiply-accumulate operation"

inline uint64_t bank_conflicts;  // of the rows of a matrix, which a GPU would read one after the other

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
    const bool counted = std::exchange(in_count, true);  // by each lane
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
      uint16_t elements[8][8];
      unsigned banks = 0;
      for (unsigned j = 0; j < 8; ++j) {
        const unsigned lane = matrix * 8 + j;
        const void* const from = arguments[lane]->row;
        if (reinterpret_cast<uintptr_t>(from) % 16) complain("a row of a matrix is misaligned");
        touch(thread / lanes * lanes + lane, from, 16, false);
        std::memcpy(elements[j], from, 16);
        banks |= 1u << reinterpret_cast<uintptr_t>(from) / 16 % 8;
      }
      bank_conflicts += banks != 0xff;
      for (unsigned lane = 0; lane < lanes; ++lane) {
        const unsigned i = lane / 4, j = lane % 4 * 2;
        const uint32_t low = transposed ? elements[j][i] : elements[i][j];
        const uint32_t high = transposed ? elements[j + 1][i] : elements[i][j + 1];
        arguments[lane]->registers[matrix] = low | high << 16;
      }
    }
    in_count = counted;
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

inline void start_block(unsigned threads) {
  threads_of_block = threads;
  first_epoch_of_block = ++block_epoch;
  for (Region& region : regions) std::memset(region.begin, 0xff, region.end - region.begin);
  for (unsigned t = 0; t < threads; ++t) {
    fibers[t].state = State::ready;
    copies[t].clear();
    groups[t] = fences[t] = fences_of_all[t] = 0;
  }
  heard_epoch = 0;
}

enum class Outcome { ended, waits, wrong };

// Runs all threads of the block to their end, or until one waits for other blocks.
inline Outcome run_block(unsigned threads, Turn& turn) {
  const auto all = [&](auto condition) {
    return std::all_of(fibers.begin(), fibers.begin() + threads, condition);
  };
  for (;;) {
    const std::vector<unsigned>& numbers = turn.next();
    for (bool moves = true; moves;) {
      moves = false;
      for (unsigned t : numbers) {
        if (fibers[t].state != State::ready) continue;
        moves = true;
        resume(t);
        if (*complaint) return Outcome::wrong;
      }
    }
    if (all([](const Fiber& fiber) { return fiber.state == State::ended; })) return Outcome::ended;
    if (!all([](const Fiber& fiber) { return fiber.state != State::at_grid_barrier; })) return Outcome::waits;
    if (!all([](const Fiber& fiber) {
          return fiber.state == State::at_block_barrier && fiber.line == fibers[0].line;
        })) {
      complain("the threads of a block part ways");
      return Outcome::wrong;
    }
    ++block_epoch;
    std::copy_n(fences, threads, fences_of_all);
    for (unsigned t = 0; t < threads; ++t) fibers[t].state = State::ready;
  }
}

// Of the exact size, so that AddressSanitizer sees its end.
constexpr std::align_val_t alignment{128};
inline void make_dynamic_memory(size_t bytes) {
  operator delete(dynamic_shared_memory, alignment);
  dynamic_shared_memory = static_cast<unsigned char*>(operator new(bytes, alignment));
  set_region(regions[1], dynamic_shared_memory, bytes);
}

inline void run_of_grid(uint64_t number) {
  block = number;
  blockIdx = dim3(number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y);
}

// A block of a cooperative launch while it does not run: the variables above hold what the one has that does.
class Waiting {
 public:
  Waiting(unsigned threads, size_t dynamic_bytes)
      : turn(threads), variables(regions[0].end - regions[0].begin) {
    exchange();
    make_fibers(threads);
    set_region(regions[0], own_regions[0].begin, variables.size());
    make_dynamic_memory(dynamic_bytes);
    exchange();
  }
  ~Waiting() {
    operator delete(memory, alignment);
    for (Region& region : own_regions) delete[] region.cells;
  }
  // Runs it until it waits for others.
  Outcome run(unsigned threads) {
    exchange();
    if (!std::exchange(has_started, true)) start_block(threads);
    for (Fiber& fiber : fibers)
      if (fiber.state == State::at_grid_barrier) fiber.state = State::ready;
    outcome = run_block(threads, turn);
    exchange();
    return outcome;
  }
  Outcome outcome = Outcome::waits;

 private:
  void exchange() {
    const std::vector<char> theirs(regions[0].begin, regions[0].end);  // memcpy is no access that is seen
    std::memcpy(regions[0].begin, variables.data(), variables.size());
    std::memcpy(variables.data(), theirs.data(), theirs.size());
    fibers.swap(own_fibers);
    std::swap(warps, own_warps), std::swap(copies, own_copies), std::swap(groups, own_groups);
    std::swap(regions, own_regions), std::swap(dynamic_shared_memory, memory);
    std::swap(block_epoch, epoch), std::swap(first_epoch_of_block, first_epoch);
  }

  Turn turn;
  bool has_started = false;
  std::vector<Fiber> own_fibers;
  Warp own_warps[most_threads / lanes] = {};
  std::vector<Copy> own_copies[most_threads];
  int own_groups[most_threads] = {};
  Region own_regions[2] = {};
  std::vector<char> variables;  // what is shared of static storage
  unsigned char* memory = nullptr;
  uint32_t epoch = 1, first_epoch = 1;
};

// False where something goes wrong.
inline bool run_together(unsigned threads, unsigned blocks, size_t dynamic_bytes) {
  is_meeting = false;
  is_cooperative = true;
  std::fill_n(arrivals, blocks, 0), std::fill_n(waits, blocks, 0);
  std::vector<std::unique_ptr<Waiting>> waiting;
  while (waiting.size() < blocks) waiting.push_back(std::make_unique<Waiting>(threads, dynamic_bytes));
  Turn turn(blocks);
  for (unsigned left = blocks; left > 0 && !*complaint;) {
    const uint64_t before = progress;
    for (unsigned number : turn.next()) {
      if (waiting[number]->outcome == Outcome::ended) continue;
      run_of_grid(number);
      if (waiting[number]->run(threads) == Outcome::ended) --left, ++progress;
      if (*complaint) break;
    }
    if (progress == before) complain("the blocks of a grid wait for one another");
  }
  is_cooperative = false;
  return !*complaint;
}

}  // namespace emulator

namespace emulator {

UNSEEN inline void access(const void* instruction, const void* p, size_t bytes, bool writes) {
  touch(thread, p, bytes, writes);
  if (counts_traffic && (cells_at(p) || is_traced(p))) count_access(instruction, p, bytes, cells_at(p));
}

}  // namespace emulator

// What -fsanitize=thread calls at every access to memory.
extern "C" {
#define FASTMLP_ACCESSES(bytes)                                                    \
  __attribute__((weak, used)) UNSEEN void __tsan_read##bytes(void* p) {            \
    emulator::access(__builtin_return_address(0), p, bytes, false);                \
  }                                                                                \
  __attribute__((weak, used)) UNSEEN void __tsan_write##bytes(void* p) {           \
    emulator::access(__builtin_return_address(0), p, bytes, true);                 \
  }                                                                                \
  __attribute__((weak, used)) UNSEEN void __tsan_unaligned_read##bytes(void* p) {  \
    emulator::access(__builtin_return_address(0), p, bytes, false);                \
  }                                                                                \
  __attribute__((weak, used)) UNSEEN void __tsan_unaligned_write##bytes(void* p) { \
    emulator::access(__builtin_return_address(0), p, bytes, true);                 \
  }
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
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(emulator::devices[device].most_shared_bytes);
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = emulator::multiprocessors;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = true;
      return cudaSuccess;
    default:
      *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
      return cudaSuccess;
  }
}
template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Parameters...)) {
  const emulator::Device& device = emulator::devices[emulator::device];
  if (!device.has_code) return emulator::fail(cudaErrorNoKernelImageForDevice);
  attributes->sharedSizeBytes = device.variables_bytes;
  return cudaSuccess;
}
// Fails for less than there was too, which another thread may be about to launch with.
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  const emulator::Device& device = emulator::devices[emulator::device];
  if (!device.has_code) return emulator::fail(cudaErrorNoKernelImageForDevice);
  size_t& own = emulator::dynamic_bytes[{emulator::device, reinterpret_cast<const void*>(kernel)}];
  if (bytes < 0 || size_t(bytes) < own || size_t(bytes) + device.variables_bytes > device.most_shared_bytes)
    return emulator::fail(cudaErrorInvalidValue);
  own = size_t(bytes);
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Parameters...), int,
                                                          size_t bytes) {
  const emulator::Device& device = emulator::devices[emulator::device];
  *blocks = bytes + device.variables_bytes <= device.most_shared_bytes;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const uint64_t threads = uint64_t{blockDim.x} * blockDim.y * blockDim.z;
  const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  if (blocks == 0 || threads == 0 || threads > emulator::most_threads || gridDim.x > INT32_MAX ||
      gridDim.y > 65535 || gridDim.z > 65535)
    return emulator::fail(cudaErrorInvalidConfiguration);
  const emulator::Device& device = emulator::devices[emulator::device];
  if (!device.has_code) return emulator::fail(cudaErrorNoKernelImageForDevice);
  const auto asked = emulator::dynamic_bytes.find({emulator::device, reinterpret_cast<const void*>(kernel)});
  const size_t dynamic_bytes = asked != emulator::dynamic_bytes.end()
                                   ? asked->second
                                   : emulator::granted_bytes - device.variables_bytes;
  if (config->dynamicSmemBytes > dynamic_bytes) return emulator::fail(cudaErrorInvalidValue);
  auto call = [&] { kernel(arguments...); };
  emulator::kernel_call = [](void* bound) { (*static_cast<decltype(call)*>(bound))(); };
  emulator::kernel_arguments = &call;
  *emulator::complaint = 0;
  if (!emulator::regions[0].begin) emulator::find_memory();
  if (config->numAttrs && config->attrs->val.cooperative) {
    ++emulator::launches;
    if (blocks > unsigned(emulator::multiprocessors))
      return emulator::fail(cudaErrorCooperativeLaunchTooLarge);
    const bool is_right =
        emulator::run_together(unsigned(threads), unsigned(blocks), config->dynamicSmemBytes);
    return is_right ? cudaSuccess : emulator::fail(cudaErrorLaunchFailure);
  }
  if (emulator::fibers.size() < threads) emulator::make_fibers(unsigned(threads));
  emulator::make_dynamic_memory(config->dynamicSmemBytes);
  emulator::grids.push_back(int64_t(blocks));
  std::vector<size_t> turn(blocks);
  std::iota(turn.begin(), turn.end(), 0);
  if (emulator::order == 1) std::reverse(turn.begin(), turn.end());
  std::mt19937 random(emulator::order);
  for (uint64_t i = 0; i < blocks * emulator::times; ++i) {
    if (i % blocks == 0) {
      ++emulator::launches;
      if (i > 0) std::memset(emulator::result, 0xff, emulator::result_bytes);
      for (uint32_t* fences : emulator::told_by) delete[] fences;
      emulator::told_by.assign(blocks, nullptr);
      emulator::told = emulator::told_by.data();
      if (emulator::order > 1) std::shuffle(turn.begin(), turn.end(), random);
    }
    emulator::run_of_grid(turn[i % blocks]);
    emulator::start_block(unsigned(threads));
    emulator::Turn of_threads{unsigned(threads)};
    if (emulator::run_block(unsigned(threads), of_threads) == emulator::Outcome::ended) {
      if (emulator::counts_traffic) emulator::count_traffic();
      continue;
    }
    if (!*emulator::complaint) emulator::complain("a block waits for others that are not there");
    emulator::fibers.clear();  // what they are in the middle of is abandoned
    for (emulator::Warp& warp : emulator::warps) warp.arrived = 0;
    return emulator::fail(cudaErrorLaunchFailure);
  }
  return cudaSuccess;
}
#endif
