// CUDA kernels as ordinary C++, for tests on a machine without a GPU.
//
// Every CUDA thread is a fiber. Blocks run one after the other, and the order of the blocks and of the lanes within a
// warp changes from launch to launch. A shuffle completes when all lanes that its mask names have arrived. What CUDA
// leaves undefined is an error here: a shuffle that lanes reach at different places or that reads from a lane that has
// ended, a barrier that some threads never reach, a launch beyond the limits of the hardware. Memory from at::empty
// holds NaN. With the compiler's sanitizers, accesses out of bounds and misaligned vectors are found too; with
// races.cpp, races between threads.
//
// Not covered: streams and devices, contraction to fused multiply-adds, at::sort and at::searchsorted on a GPU, speed.
#pragma once
#include <ATen/ATen.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#include "thread.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct alignas(8) int2 {
  int x, y;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
using std::floor, std::max, std::min;

namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
};
struct CUDAStream {};
inline CUDAStream getCurrentCUDAStream() { return {}; }
}  // namespace c10::cuda
#define C10_CUDA_KERNEL_LAUNCH_CHECK() ((void)0)

EmulatedThread emulated_thread{};

namespace emulation {

#define EMULATION_CODE __attribute__((no_sanitize("address", "thread"))) inline  // whose accesses are no kernel's

constexpr int WARP = 32, MOST_THREADS = 1024;
constexpr size_t STACK_BYTES = 256 << 10;

enum class Status { ready, in_shuffle, at_barrier, ended };

struct Shuffle {
  int place;  // in the source
  unsigned mask;
  int width;  // 0: a barrier of the warp
  bool operator==(const Shuffle&) const = default;
};

struct Thread {
  Status status = Status::ended;
  uint3 index{};
  int lane = 0;
  Shuffle shuffle{};
  int source = 0;         // the lane that a shuffle reads from
  uint64_t value = 0;     // given to a shuffle; then what it returns
  ucontext_t context{};   // where it starts, and with AddressSanitizer where it goes on
  jmp_buf place{};        // where it goes on: without the system calls of swapcontext
  bool started = false;
  void* shadow = nullptr;  // AddressSanitizer's view of the stack
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
};

// Memory of a block. It is kept until the launch ends, so that no two blocks have the same.
struct Shared {
  unsigned block;
  int place;
  std::unique_ptr<std::max_align_t[]> bytes;
};

struct Machine {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Shared> shared;
  std::array<unsigned, MOST_THREADS / WARP> warp_phases{};
  Thread* current = nullptr;
  ucontext_t context{};
  jmp_buf place{};
  void* shadow = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void (*kernel)(void*) = nullptr;
  void* arguments = nullptr;
  std::string error;
  std::mt19937 order{0};
};
inline Machine machine;  // kernels run on one thread of the system at a time
inline uint3 block_index, block_size, grid_size;

// ------------------------------------------------------------------------------------------ fibers

EMULATION_CODE void to_scheduler() {
  Thread& self = *machine.current;
  emulated_thread.stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&self.shadow, machine.stack, machine.stack_bytes);
  swapcontext(&self.context, &machine.context);
  __sanitizer_finish_switch_fiber(self.shadow, &machine.stack, &machine.stack_bytes);
#else
  if (!_setjmp(self.place)) _longjmp(machine.place, 1);
#endif
  emulated_thread.stack = self.stack.get();
}

EMULATION_CODE void life_of_a_thread() {  // it serves one launch after the other
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.stack, &machine.stack_bytes);
#endif
  for (;;) {
    emulated_thread.stack = machine.current->stack.get();
    machine.kernel(machine.arguments);
    machine.current->status = Status::ended;
    to_scheduler();
  }
}

EMULATION_CODE void resume(Thread& thread) {
  machine.current = &thread;
  emulated_thread.thread = thread.index.x;
  emulated_thread.warp_phase = machine.warp_phases[thread.index.x / WARP];
#if defined(__SANITIZE_ADDRESS__)
  thread.started = true;
  __sanitizer_start_switch_fiber(&machine.shadow, thread.stack.get(), STACK_BYTES);
  swapcontext(&machine.context, &thread.context);
  __sanitizer_finish_switch_fiber(machine.shadow, nullptr, nullptr);
#else
  if (!_setjmp(machine.place)) {
    if (thread.started) _longjmp(thread.place, 1);
    thread.started = true;
    setcontext(&thread.context);
  }
#endif
  machine.current = nullptr;
}

// Ends the launch. A thread cannot throw: its stack does not lead to the caller's.
inline void fail(const std::string& what) {
  if (machine.error.empty()) {
    machine.error = "CUDA emulation: " + what + " (block " + std::to_string(block_index.x);
    machine.error += machine.current ? ", thread " + std::to_string(machine.current->index.x) + ")" : ")";
  }
  if (machine.current) to_scheduler();  // for good
}

// ------------------------------------------------------------------------------------------ warps and blocks

// All lanes wait or have ended: let a shuffle hand its values over. Returns whether there was one.
inline bool complete_shuffle(Thread* const* lanes, int count) {
  Thread* first = nullptr;
  for (int i = 0; i < count; ++i) {
    if (lanes[i]->status != Status::in_shuffle) continue;
    first = first ? first : lanes[i];
    if (lanes[i]->shuffle != first->shuffle)
      fail("lanes " + std::to_string(first->lane) + " and " + std::to_string(lanes[i]->lane) +
           " wait in different shuffles");
    if (!(lanes[i]->shuffle.mask >> i & 1)) fail("a lane is in a shuffle whose mask does not name it");
  }
  if (!first) return false;
  std::array<uint64_t, WARP> given{};
  for (int i = 0; i < count; ++i) {
    given[i] = lanes[i]->value;
    if (lanes[i]->status == Status::at_barrier && first->shuffle.mask >> i & 1)
      fail("a shuffle waits for a lane that waits at a barrier");
  }
  if (first->shuffle.width == 0) ++machine.warp_phases[first->index.x / WARP];
  for (int i = 0; i < count; ++i) {
    if (lanes[i]->status != Status::in_shuffle) continue;
    const int source = lanes[i]->source;
    if (source >= count || lanes[source]->status == Status::ended) fail("a shuffle reads from a lane that has ended");
    if (machine.error.empty()) lanes[i]->value = given[source];
  }
  for (int i = 0; i < count; ++i)
    if (lanes[i]->status == Status::in_shuffle) lanes[i]->status = Status::ready;
  return true;
}

inline void run_block(unsigned size) {
  auto& threads = machine.threads;
  while (threads.size() < size) {
    threads.push_back(std::make_unique<Thread>());
    auto& context = threads.back()->context;
    getcontext(&context);
    context.uc_stack = {.ss_sp = threads.back()->stack.get(), .ss_flags = 0, .ss_size = STACK_BYTES};
    makecontext(&context, life_of_a_thread, 0);
  }
  std::vector<Thread*> all(size), shuffled;
  for (unsigned i = 0; i < size; ++i) {
    all[i] = threads[i].get();
    all[i]->status = Status::ready;
    all[i]->index = {i, 0, 0};
    all[i]->lane = static_cast<int>(i % WARP);
  }
  emulated_thread.phase = 0;
  machine.warp_phases = {};
  emulated_thread.stack_bytes = STACK_BYTES;
  for (;;) {
    for (unsigned first = 0; first < size; first += WARP) {
      const int count = static_cast<int>(std::min<unsigned>(WARP, size - first));
      do {
        shuffled.assign(all.begin() + first, all.begin() + first + count);
        std::shuffle(shuffled.begin(), shuffled.end(), machine.order);
        for (Thread* thread : shuffled) {
          if (thread->status == Status::ready) resume(*thread);
          if (!machine.error.empty()) return;
        }
      } while (complete_shuffle(&all[first], count) && machine.error.empty());
      if (!machine.error.empty()) return;
    }
    bool waiting = false;
    for (Thread* thread : all) {
      if (thread->status != Status::at_barrier) continue;
      thread->status = Status::ready;
      waiting = true;
    }
    if (!waiting) return;
    ++emulated_thread.phase;
  }
}

template <typename Kernel, typename... Arguments>
void launch(unsigned grid, unsigned block, size_t, c10::cuda::CUDAStream, Kernel kernel, Arguments... arguments) {
  TORCH_CHECK(1 <= block && block <= MOST_THREADS, "CUDA emulation: a block of ", block, " threads");
  TORCH_CHECK(1 <= grid && grid <= 0x7fffffffu, "CUDA emulation: a grid of ", grid, " blocks");
  TORCH_CHECK((sizeof(arguments) + ... + 0) <= 4096, "CUDA emulation: more than 4096 bytes of arguments");
  auto call = [&] { kernel(arguments...); };
  machine.kernel = [](void* made) { (*static_cast<decltype(call)*>(made))(); };
  machine.arguments = &call;
  block_size = {block, 1, 1};
  grid_size = {grid, 1, 1};
  ++emulated_thread.launch;
  std::vector<unsigned> order(grid);
  for (unsigned i = 0; i < grid; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), machine.order);
  for (unsigned x : order) {
    block_index = {x, 0, 0};
    emulated_thread.block = x;
    run_block(block);
    if (machine.error.empty()) continue;
    machine.threads.clear();  // they stand in the middle of the kernel
    TORCH_CHECK(false, std::exchange(machine.error, {}));
  }
  machine.shared.clear();
}

// ------------------------------------------------------------------------------------------ what kernels call

template <typename T>
EMULATION_CODE T shuffle(int place, unsigned mask, T value, int source, int width) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Thread& self = *machine.current;
  if (width > WARP || (width & (width - 1))) fail("a shuffle of width " + std::to_string(width));
  if (width && source / width != self.lane / width) fail("a shuffle from lane " + std::to_string(source) + ", of another group");
  __builtin_memcpy(&self.value, &value, sizeof(T));
  self.shuffle = {place, mask, width};
  self.source = source;
  self.status = Status::in_shuffle;
  to_scheduler();
  __builtin_memcpy(&value, &self.value, sizeof(T));
  return value;
}

template <typename T>
EMULATION_CODE T add(T* to, T value) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(T)) fail("a misaligned atomicAdd");
  if (emulated_atomic) emulated_atomic(to, sizeof(T));
  const T before = *to;
  *to = before + value;
  return before;
}

// An array in shared memory, which holds NaN at first.
template <typename T>
EMULATION_CODE T* shared(int place, size_t count) {
  static_assert(alignof(T) <= alignof(std::max_align_t));
  auto* const stack = emulated_thread.stack;
  emulated_thread.stack = nullptr;  // what follows is no kernel's
  const auto found = std::find_if(machine.shared.begin(), machine.shared.end(), [&](const Shared& made) {
    return made.block == block_index.x && made.place == place;
  });
  std::max_align_t* bytes;
  if (found != machine.shared.end()) {
    bytes = found->bytes.get();
  } else {
    const size_t units = count * sizeof(T) / sizeof(std::max_align_t) + 1;
    machine.shared.push_back({block_index.x, place, std::make_unique<std::max_align_t[]>(units)});
    bytes = machine.shared.back().bytes.get();
    std::memset(bytes, 0xff, units * sizeof(std::max_align_t));
  }
  emulated_thread.stack = stack;
  return reinterpret_cast<T*>(bytes);
}

// What memory from at::empty holds on a GPU is anybody's guess.
inline at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  auto made = at::empty(sizes, options);
  return made.is_floating_point() ? made.fill_(std::nan("")) : made.fill_(0x7ffffff0);
}

}  // namespace emulation

#define threadIdx (emulation::machine.current->index)
#define blockIdx emulation::block_index
#define blockDim emulation::block_size
#define gridDim emulation::grid_size

#define __shfl_sync(mask, value, source, width) \
  emulation::shuffle(__COUNTER__, mask, value, emulation::machine.current->lane / (width) * (width) + (source) % (width), width)
#define __shfl_xor_sync(mask, value, other, width) \
  emulation::shuffle(__COUNTER__, mask, value, emulation::machine.current->lane ^ (other), width)

#define __syncwarp() emulation::shuffle(__COUNTER__, 0xffffffffu, 0, emulation::machine.current->lane, 0)

EMULATION_CODE void __syncthreads() {
  emulation::machine.current->status = emulation::Status::at_barrier;
  emulation::to_scheduler();
}

template <typename T>
EMULATION_CODE T atomicAdd(T* to, T value) {
  return emulation::add(to, value);
}
EMULATION_CODE float4 operator+(const float4& a, const float4& b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

EMULATION_CODE float __uint_as_float(unsigned bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
