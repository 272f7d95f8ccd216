// Races between CUDA threads: the functions that the compiler calls at every memory access under -fsanitize=thread, in
// the place of ThreadSanitizer's own. Two accesses to the same bytes in one launch are a race if they come from different
// threads, at least one writes, not both are atomic, and no barrier of their common block or warp lies between them.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <unordered_map>

#include "thread.h"

namespace {

enum Kind { READ, WRITE, ATOMIC };
const char* const NAMES[] = {"read", "write", "atomic addition"};

enum Scope { THREAD, WARP, BLOCK, GRID };
constexpr unsigned WARP_SIZE = 32;

struct Access {
  uint64_t launch = 0;
  unsigned block = 0, thread = 0, phase = 0, warp_phase = 0;
  Scope scope = THREAD;  // who made it since it was last certain to be over
  Kind kind = READ;
};
struct Granule {
  Access reading, writing;
};
constexpr uintptr_t BYTES = 2;  // of a granule: the smallest type in use
std::unordered_map<uintptr_t, Granule> memory;
uint64_t launch_of_memory = 0;

// The smallest group that holds the threads of an access and the one that runs.
Scope common(const Access& before, const EmulatedThread& now) {
  Scope scope = GRID;
  if (before.block == now.block) scope = BLOCK;
  if (scope == BLOCK && before.thread / WARP_SIZE == now.thread / WARP_SIZE) scope = WARP;
  if (scope == WARP && before.thread == now.thread) scope = THREAD;
  return std::max(scope, before.scope);
}

bool ordered(const Access& before, const EmulatedThread& now) {
  if (before.launch != now.launch) return true;
  const Scope scope = common(before, now);
  if (scope == GRID) return false;
  if (before.phase != now.phase) return true;
  if (scope == BLOCK) return false;
  return before.warp_phase != now.warp_phase || scope == THREAD;
}

void note(Access& last, const EmulatedThread& now, Kind kind) {
  const Scope scope = ordered(last, now) ? THREAD : common(last, now);
  last = {now.launch, now.block, now.thread, now.phase, now.warp_phase, scope, kind};
}

[[noreturn]] void report(const void* address, const EmulatedThread& now, Kind kind, const Access& before) {
  std::fprintf(stderr, "CUDA emulation: a race at %p: %s by block %u thread %u, %s by block %u thread %u\n", address,
               NAMES[before.kind], before.block, before.thread, NAMES[kind], now.block, now.thread);
  std::_Exit(66);
}

void check(const void* address, size_t bytes, Kind kind) {
  const EmulatedThread now = emulated_thread;
  if (!now.stack) return;  // not in a kernel
  const auto* at = static_cast<const char*>(address);
  if (at >= now.stack && at < now.stack + now.stack_bytes) return;  // a thread's own variables
  if (launch_of_memory != now.launch) memory.clear();
  launch_of_memory = now.launch;
  const auto first = reinterpret_cast<uintptr_t>(address) / BYTES;
  for (uintptr_t i = first; i * BYTES < reinterpret_cast<uintptr_t>(address) + bytes; ++i) {
    Granule& granule = memory[i];
    const bool both_atomic = kind == ATOMIC && granule.writing.kind == ATOMIC;
    if (!both_atomic && !ordered(granule.writing, now)) report(address, now, kind, granule.writing);
    if (kind != READ && !ordered(granule.reading, now)) report(address, now, kind, granule.reading);
    note(kind == READ ? granule.reading : granule.writing, now, kind);
  }
}

}  // namespace

extern "C" {
void emulated_atomic(const void* address, size_t bytes) { check(address, bytes, ATOMIC); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* at, size_t bytes) { check(at, bytes, READ); }
void __tsan_write_range(void* at, size_t bytes) { check(at, bytes, WRITE); }
#define ACCESSES(N)                                               \
  void __tsan_read##N(void* at) { check(at, N, READ); }           \
  void __tsan_write##N(void* at) { check(at, N, WRITE); }         \
  void __tsan_unaligned_read##N(void* at) { check(at, N, READ); } \
  void __tsan_unaligned_write##N(void* at) { check(at, N, WRITE); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
// reference counts of tensors, outside kernels
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
#define ATOMICS(N, T)                                                                                        \
  T __tsan_atomic##N##_load(const volatile T* at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }     \
  void __tsan_atomic##N##_store(volatile T* at, T v, int) { __atomic_store_n(at, v, __ATOMIC_SEQ_CST); }     \
  T __tsan_atomic##N##_exchange(volatile T* at, T v, int) {                                                  \
    return __atomic_exchange_n(at, v, __ATOMIC_SEQ_CST);                                                     \
  }                                                                                                          \
  T __tsan_atomic##N##_fetch_add(volatile T* at, T v, int) {                                                 \
    return __atomic_fetch_add(at, v, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                          \
  T __tsan_atomic##N##_fetch_sub(volatile T* at, T v, int) {                                                 \
    return __atomic_fetch_sub(at, v, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                          \
  T __tsan_atomic##N##_fetch_or(volatile T* at, T v, int) { return __atomic_fetch_or(at, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##N##_fetch_and(volatile T* at, T v, int) {                                                 \
    return __atomic_fetch_and(at, v, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                          \
  int __tsan_atomic##N##_compare_exchange_strong(volatile T* at, T* expected, T v, int, int) {               \
    return __atomic_compare_exchange_n(at, expected, v, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);              \
  }                                                                                                          \
  int __tsan_atomic##N##_compare_exchange_weak(volatile T* at, T* expected, T v, int, int) {                 \
    return __atomic_compare_exchange_n(at, expected, v, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);              \
  }
ATOMICS(8, uint8_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)
}
