// A CUDA kernel on a CPU, for tests: one block at a time, each of its threads a fiber, switched at shuffles and barriers.
// It finds wrong indices, missing masks, missing shuffle steps, shuffles that not all lanes reach (abort with a message) and,
// under AddressSanitizer, every access outside the tensors and the shared memory. It cannot find data races: fibers take turns.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define SEMIDETR_LAUNCH(kernel, blocks, threads, shared, stream, ...) \
  cuda_on_cpu::launch(blocks, threads, shared, [&] { (void)(stream); kernel(__VA_ARGS__); })
#define SEMIDETR_SHARED(T, name) T* name = static_cast<T*>(cuda_on_cpu::state().shared)

namespace cuda_on_cpu {

struct Index { unsigned x = 0, y = 0, z = 0; };

struct Meeting { unsigned long count = 0; };            // how often lanes have come here, all together

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  unsigned long shuffles = 0, warps = 0, blocks = 0;    // meetings this thread has come to
};

constexpr size_t kStack = 256 * 1024;

struct State {
  Index thread, block, block_dim, grid_dim;
  void* shared = nullptr;
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  unsigned current = 0;
  unsigned long moves = 0;                              // progress, to notice a deadlock
  std::vector<Meeting> shuffle, warp;                   // by warp
  Meeting whole;
  std::vector<uint32_t> slot[2];                        // what a lane shows to the others, by parity of the shuffle
  const std::function<void()>* body = nullptr;
};
inline State& state() { static State s; return s; }

inline void yield() { State& s = state(); Fiber& f = s.fibers[s.current]; swapcontext(&f.context, &s.scheduler); }

inline void meet(Meeting& m, unsigned long& mine, unsigned size) {
  State& s = state();
  mine++; m.count++; s.moves++;
  while (m.count < mine * size) yield();
}

inline void entry() {
  State& s = state();
  (*s.body)();
  s.fibers[s.current].done = true; s.moves++;
  swapcontext(&s.fibers[s.current].context, &s.scheduler);
}

inline void launch(unsigned blocks, unsigned threads, size_t shared, const std::function<void()>& body) {
  State& s = state();
  s.body = &body; s.grid_dim.x = blocks; s.block_dim.x = threads;
  if (s.fibers.size() < threads) s.fibers.resize(threads);
  for (unsigned b = 0; b < blocks; b++) {
    s.block.x = b;
    std::unique_ptr<char[]> memory(new char[shared ? shared : 1]);
    memset(memory.get(), 0xff, shared);                 // NaN: shared memory starts undefined
    s.shared = memory.get();
    unsigned warps = (threads + 31) / 32;
    s.shuffle.assign(warps, {}); s.warp.assign(warps, {}); s.whole = {};
    for (auto& v : s.slot) v.assign(threads, 0xffffffffu);
    for (unsigned t = 0; t < threads; t++) {
      Fiber& f = s.fibers[t];
      if (!f.stack) f.stack.reset(new char[kStack]);
      f.done = false; f.shuffles = f.warps = f.blocks = 0;
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get(); f.context.uc_stack.ss_size = kStack; f.context.uc_link = &s.scheduler;
      makecontext(&f.context, entry, 0);
    }
    for (unsigned left = threads; left;) {
      unsigned long before = s.moves;
      left = 0;
      for (unsigned t = 0; t < threads; t++) {
        if (s.fibers[t].done) continue;
        s.current = t; s.thread.x = t;
        swapcontext(&s.scheduler, &s.fibers[t].context);
        left += !s.fibers[t].done;
      }
      if (left && s.moves == before) { fprintf(stderr, "cuda_on_cpu: %u threads wait at a shuffle or barrier that the others never reach\n", left); abort(); }
    }
  }
  s.shared = nullptr;
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::state().thread)
#define blockIdx (cuda_on_cpu::state().block)
#define blockDim (cuda_on_cpu::state().block_dim)
#define gridDim (cuda_on_cpu::state().grid_dim)

template <class T> inline T __shfl_xor_sync(unsigned mask, T x, int lane_mask) {
  static_assert(sizeof(T) == 4, "32-bit values only");
  using namespace cuda_on_cpu;
  State& s = state();
  if (mask != 0xffffffffu) { fprintf(stderr, "cuda_on_cpu: only full warps shuffle\n"); abort(); }
  const unsigned t = s.current;
  Fiber& f = s.fibers[t];
  std::vector<uint32_t>& slot = s.slot[f.shuffles & 1];
  memcpy(&slot[t], &x, 4);
  meet(s.shuffle[t / 32], f.shuffles, 32);
  memcpy(&x, &slot[t ^ unsigned(lane_mask)], 4);
  return x;
}
inline void __syncwarp(unsigned = 0xffffffffu) { using namespace cuda_on_cpu; State& s = state(); meet(s.warp[s.current / 32], s.fibers[s.current].warps, 32); }
inline void __syncthreads() { using namespace cuda_on_cpu; State& s = state(); meet(s.whole, s.fibers[s.current].blocks, s.block_dim.x); }
inline float atomicAdd(float* p, float x) { float old = *p; *p = old + x; return old; }
