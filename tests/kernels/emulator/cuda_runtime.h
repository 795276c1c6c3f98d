// Stands in for CUDA's header when csrc/cuda/*.cu are compiled as plain C++:
// kernels run on the CPU, one block after the other, each thread of a block as
// a fiber. Barriers and shuffles hand over to the next fiber, so all threads of
// a block must reach them, as on a GPU. It shows what kernels compute, not how
// fast, and no races between blocks.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};

namespace emulator {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 18);
  bool done;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned running;
inline std::function<void()> kernel;
inline double exchanged[1024];

struct Index {
  unsigned x;
};
inline Index block;

inline void yield() { swapcontext(&fibers[running].context, &scheduler); }

inline void enter() {
  kernel();
  fibers[running].done = true;
  yield();
}

inline void run(int64_t blocks, unsigned threads,
                const std::function<void()> &body) {
  kernel = body;
  if (fibers.size() < threads)
    fibers.resize(threads);
  for (int64_t index = 0; index < blocks; ++index) {
    block.x = unsigned(index);
    for (unsigned thread = 0; thread < threads; ++thread) {
      Fiber &fiber = fibers[thread];
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      makecontext(&fiber.context, enter, 0);
    }
    for (bool any = true; any;) {
      any = false;
      for (running = 0; running < threads; ++running) {
        if (fibers[running].done)
          continue;
        any = true;
        swapcontext(&scheduler, &fibers[running].context);
      }
    }
  }
}

} // namespace emulator

#define threadIdx (emulator::Index{emulator::running})
#define blockIdx (emulator::block)

template <class Word> Word __ldcg(const Word *word) { return *word; }
template <class Word> void __stcg(Word *word, Word value) { *word = value; }

// One block at a time, one thread at a time.
inline int atomicAdd(int *address, int value) {
  const int before = *address;
  *address += value;
  return before;
}

inline void __syncthreads() { emulator::yield(); }

inline uint32_t __shfl_xor_sync(unsigned, uint32_t value, unsigned lanes) {
  emulator::exchanged[emulator::running] = value;
  emulator::yield();
  const uint32_t other = uint32_t(emulator::exchanged[emulator::running ^ lanes]);
  emulator::yield();
  return other;
}

inline double __shfl_down_sync(unsigned, double value, unsigned offset) {
  const unsigned thread = emulator::running;
  emulator::exchanged[thread] = value;
  emulator::yield();
  const double other =
      thread % 32 + offset < 32 ? emulator::exchanged[thread + offset] : value;
  emulator::yield();
  return other;
}
