// Runs CUDA kernels on the CPU, to test what they compute where there is no GPU; how fast and how they race is a GPU's
// to say. Blocks run one after the other. The threads of a block are fibers, each of which runs until it must wait for
// the others, in an order that schedule() shuffles: where a barrier is missing, results depend on it.
#pragma once

#include <torch/headeronly/util/Exception.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define aoti_torch_get_current_cuda_stream(device, stream) AOTI_TORCH_SUCCESS

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
using std::max;
using std::min;

namespace cuda_on_cpu {

constexpr int kWarp = 32;
enum State { ready, at_warp, at_block, done };

struct Thread {
  State state;
  jmp_buf place;                   // where it goes on
  std::unique_ptr<char[]> stack;   // null: it has never run
};

inline std::vector<Thread> threads(1024);
inline uint64_t slots[1024];   // what the threads of a warp show one another
inline int current;
inline jmp_buf scheduler;
inline std::function<void()> kernel;
inline std::mt19937 random;
inline bool shuffled;

// 0: blocks and threads in their order; otherwise in orders that the seed draws, and fewer blocks than asked for.
inline void schedule(int64_t seed) { shuffled = seed != 0, random.seed(uint32_t(seed)); }

inline std::vector<int> order_of(int n) {
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  if (shuffled) std::shuffle(order.begin(), order.end(), random);
  return order;
}

// Changes of place are jumps: those of ucontext.h, which begin a thread, ask the system each time.
inline void wait(State state) {
  threads[current].state = state;
  if (!_setjmp(threads[current].place)) _longjmp(scheduler, 1);
}

inline void run_for_ever() {
  for (;;) kernel(), wait(done);
}

inline void resume(int t) {
  constexpr size_t kStack = 1 << 16;
  Thread& thread = threads[current = t];
  if (_setjmp(scheduler)) return;
  if (thread.stack) _longjmp(thread.place, 1);
  thread.stack.reset(new char[kStack]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = thread.stack.get(), context.uc_stack.ss_size = kStack;
  makecontext(&context, run_for_ever, 0);
  setcontext(&context);
}

// The waiting threads first ... last - 1 go on where all that are not done have come to the same barrier.
inline bool release(int first, int last, State barrier) {
  bool some = false;
  for (int t = first; t < last; ++t) {
    if (threads[t].state != barrier && threads[t].state != done) return false;
    some |= threads[t].state == barrier;
  }
  for (int t = first; t < last; ++t)
    if (threads[t].state == barrier) threads[t].state = ready;
  return some;
}

inline void run_block(int size) {
  for (int t = 0; t < size; ++t) threads[t].state = ready;
  for (bool going = true; going;) {
    going = false;
    for (int t : order_of(size)) {
      if (threads[t].state != ready) continue;
      threadIdx = dim3(t % blockDim.x, t / blockDim.x), going = true;
      resume(t);
    }
    for (int warp = 0; warp < size; warp += kWarp) going |= release(warp, min(size, warp + kWarp), at_warp);
    going |= release(0, size, at_block);
  }
  for (int t = 0; t < size; ++t)
    STD_TORCH_CHECK(threads[t].state == done, "thread ", t, " of block ", blockIdx.x, " waits for ever");
}

inline void launch(dim3 grid, dim3 block, std::function<void()> call) {
  if (shuffled) grid.x = 1 + random() % grid.x;
  kernel = std::move(call), gridDim = grid, blockDim = block;
  for (int b : order_of(int(grid.x))) blockIdx = dim3(b), run_block(int(block.x * block.y));
}

// f(what the threads of the warp gave, this thread's place in it).
template <class T, class F>
T across_warp(T value, const F& f) {
  static_assert(sizeof(T) <= sizeof *slots);
  memcpy(slots + current, &value, sizeof value);
  wait(at_warp);
  T all[kWarp];
  for (int i = 0; i < kWarp; ++i) memcpy(all + i, slots + current / kWarp * kWarp + i, sizeof value);
  wait(at_warp);   // before another value is shown
  return f(all, current % kWarp);
}

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::at_block); }
inline void __syncwarp() { cuda_on_cpu::wait(cuda_on_cpu::at_warp); }
inline void __threadfence() {}
inline void __stcg(uint4* to, uint4 value) { *to = value; }

template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return cuda_on_cpu::across_warp(value, [=](const T* all, int lane) { return all[lane ^ distance]; });
}
inline int __reduce_max_sync(unsigned, int value) {
  return cuda_on_cpu::across_warp(value, [](const int* all, int) { return *std::max_element(all, all + cuda_on_cpu::kWarp); });
}

template <class T>
T atomicAdd(T* to, T value) {
  const T was = *to;
  *to = was + value;
  return was;
}
inline uint32_t atomicOr(uint32_t* to, uint32_t value) {
  const uint32_t was = *to;
  *to |= value;
  return was;
}
