// The CUDA thread that runs, as cuda.h knows it and races.cpp asks for it.
#pragma once
#include <cstddef>
#include <cstdint>

struct EmulatedThread {
  uint64_t launch;
  unsigned block, thread;
  unsigned phase, warp_phase;  // barriers passed by the block, and by the warp
  const char* stack;              // nullptr outside kernels
  size_t stack_bytes;
};
extern "C" EmulatedThread emulated_thread;
extern "C" void emulated_atomic(const void* address, size_t bytes) __attribute__((weak));  // where races are looked for
