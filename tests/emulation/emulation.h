// Runs the kernels of csrc/cuda on the host. A host compiler reads this file where nvcc reads csrc/cuda/ptx.h.
//
// Every CUDA thread is a fiber; one thread block runs at a time, and in every round its threads run in a newly shuffled
// order, until they wait. What the hardware does in the background happens here at one of the two extreme moments, by
// the seed: copies and matrix products either when they are issued or only when they are waited for. So data used too
// early, or overwritten too early, gives a wrong result with one seed or the other. Further:
//
// - shared memory starts as NaN, and what reads or writes beyond it is reported;
// - a barrier that not all threads reach ends the launch with a report, as does a warp whose lanes do different things;
// - wgmma must not read what a thread has written and not fenced (fence.proxy.async);
// - faults can be planted (enum Fault), to show that the tests would find them.
//
// It checks the kernels against our reading of the PTX manual, which a GPU must confirm. It knows nothing of speed, of
// bank conflicts, of the memory model between thread blocks, or of the swizzled layouts.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <setjmp.h>
#include <ucontext.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulation {

enum Fault : int {
  kNoFault,
  kNoNamedBarrier,    // named barriers let everyone pass
  kNoMbarrierWait,    // waiting for an mbarrier does not wait
  kNoCopyWait,        // cp.async is never waited for
  kNoWgmmaWait,       // wgmma is never waited for
  kNoProxyFence,      // writes are not made visible to wgmma
  kWrongStride,       // the stride of wgmma's operands is 16 bytes too large
  kDivergentBarrier,  // one thread leaves out __syncthreads
  kNoSyncthreads,     // __syncthreads lets everyone pass
};

constexpr int kFailed = 90001;  // what a launch returns when something was reported
constexpr std::size_t kSharedMost = 227 * 1024;
constexpr std::size_t kStackBytes = 96 << 10;

// A barrier: `generation` changes when `have` reaches the number of threads it is for.
struct Rendezvous {
  std::uint64_t generation = 0;
  int have = 0;
};

struct Warp {
  Rendezvous meeting;
  alignas(16) unsigned char slots[2][32][64];  // what each lane brings, in alternating turns
  int kinds[2][32];
};

using Work = std::function<void()>;
struct Background {  // operations issued, and groups of them committed
  std::vector<Work> open;
  std::deque<std::vector<Work>> groups;
};

struct Fiber {
  ucontext_t context;  // to start it; from then on `jump`, which needs no system call
  jmp_buf jump;
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  uint3 thread{};
  int linear = 0, turn = 0;
  bool done = false;
  const std::uint64_t* word = nullptr;  // blocked while (*word & mask) == value
  std::uint64_t mask = 0, value = 0;
  Background copies, products;
  std::vector<std::size_t> unfenced;
};

struct State {
  std::uint64_t random = 1;
  bool late = true;  // background work happens when it is waited for
  int fault = kNoFault;
  std::string message;
  jmp_buf scheduler;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* current = nullptr;
  std::vector<Warp> warps;
  Rendezvous barriers[16];
  dim3 block_index, block_size, grid_size;
  const Work* body = nullptr;
  std::unique_ptr<unsigned char[]> memory{new unsigned char[kSharedMost + 1024]};
  unsigned char* shared = nullptr;
  std::size_t shared_bytes = 0;
  std::vector<bool> unfenced;  // pieces of 16 bytes
};

inline State& state() {
  static State s;
  return s;
}

inline void report(const std::string& message) {
  if (state().message.empty()) state().message = message;
}

inline std::uint64_t draw() {
  std::uint64_t& x = state().random;
  x = x * 6364136223846793005u + 1442695040888963407u;
  return x >> 33;
}

// No local variable lives across the jumps.
[[gnu::noinline]] inline void suspend(Fiber& f) {
  if (_setjmp(f.jump) == 0) _longjmp(state().scheduler, 1);
}
[[gnu::noinline]] inline void resume(Fiber& f) {
  if (_setjmp(state().scheduler) != 0) return;
  if (f.started) _longjmp(f.jump, 1);
  f.started = true;
  setcontext(&f.context);
}

inline void block_while(const std::uint64_t* word, std::uint64_t mask, std::uint64_t value) {
  Fiber& f = *state().current;
  f.word = word;
  f.mask = mask;
  f.value = value;
  suspend(f);
}

inline void meet(Rendezvous& r, int threads) {
  const std::uint64_t generation = r.generation;
  if (++r.have == threads) {
    r.have = 0;
    ++r.generation;
    return;
  }
  block_while(&r.generation, ~0ull, generation);
}

inline void entry() {
  State& s = state();
  (*s.body)();
  s.current->done = true;
  suspend(*s.current);
}

inline void start(Fiber& f, int linear, dim3 size) {
  f.linear = linear;
  f.turn = 0;
  f.thread = uint3{linear % size.x, linear / size.x % size.y, linear / (size.x * size.y)};
  f.done = f.started = false;
  f.word = nullptr;
  f.copies = f.products = {};
  f.unfenced.clear();
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = kStackBytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, entry, 0);
}

inline bool run_block(int threads) {
  State& s = state();
  s.warps.assign((threads + 31) / 32, Warp{});
  for (Rendezvous& r : s.barriers) r = {};
  std::memset(s.shared, 0xff, s.shared_bytes);
  s.unfenced.assign(s.shared_bytes / 16 + 1, false);
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) {
    order[i] = i;
    start(*s.fibers[i], i, s.block_size);
  }
  for (int left = threads; left > 0;) {
    for (int i = threads - 1; i > 0; --i) std::swap(order[i], order[draw() % (i + 1)]);
    bool moved = false;
    for (const int i : order) {
      Fiber& f = *s.fibers[i];
      if (f.done || (f.word != nullptr && (*f.word & f.mask) == f.value)) continue;
      f.word = nullptr;
      moved = true;
      s.current = &f;
      resume(f);
      left -= f.done;
    }
    if (!moved) {
      report("deadlock: " + std::to_string(left) + " of " + std::to_string(threads) + " threads wait for ever");
      return false;
    }
  }
  for (const Warp& w : s.warps) {
    if (w.meeting.have != 0) report("a warp operation that not all lanes reached");
  }
  return true;
}

inline int run_grid(dim3 grid, int threads, std::size_t shared_bytes, const Work& body) {
  State& s = state();
  if (shared_bytes > kSharedMost || threads > 1024) {
    report("too much shared memory or too many threads");
    return kFailed;
  }
  s.grid_size = grid;
  s.block_size = dim3(threads);
  s.body = &body;
  s.shared_bytes = shared_bytes;
  s.shared = reinterpret_cast<unsigned char*>((reinterpret_cast<std::uintptr_t>(s.memory.get()) + 1023) & ~1023ull);
  while (s.fibers.size() < static_cast<std::size_t>(threads)) {
    s.fibers.emplace_back(new Fiber);
    getcontext(&s.fibers.back()->context);
  }
  const unsigned count = grid.x * grid.y * grid.z;
  std::vector<unsigned> blocks(count);
  for (unsigned i = 0; i < count; ++i) blocks[i] = i;
  for (unsigned i = count - 1; i > 0; --i) std::swap(blocks[i], blocks[draw() % (i + 1)]);
  for (const unsigned b : blocks) {
    s.block_index = dim3(b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y));
    if (!run_block(threads)) break;
  }
  return s.message.empty() ? 0 : kFailed;
}

// The lanes' values of one warp operation, in lane order. All lanes must come with the same kind of operation.
template <typename V>
const unsigned char (&gather(const V& mine, int kind))[32][64] {
  static_assert(sizeof(V) <= 64);
  Fiber& f = *state().current;
  Warp& w = state().warps[f.linear / 32];
  const int turn = f.turn++ % 2;  // no lane can be two operations ahead of another
  std::memcpy(w.slots[turn][f.linear % 32], &mine, sizeof mine);
  w.kinds[turn][f.linear % 32] = kind;
  meet(w.meeting, 32);
  for (const int k : w.kinds[turn]) {
    if (k != kind) report("lanes of one warp do different operations");
  }
  return w.slots[turn];
}

template <typename V>
V lane_value(const unsigned char (&slots)[32][64], int lane) {
  V v;
  std::memcpy(&v, slots[lane], sizeof v);
  return v;
}

inline void issue(Background& b, Work work) {
  if (state().late) {
    b.open.push_back(std::move(work));
  } else {
    work();
  }
}

inline void commit(Background& b) {
  b.groups.push_back(std::move(b.open));
  b.open.clear();
}

inline void wait(Background& b, int pending) {
  while (static_cast<int>(b.groups.size()) > pending) {
    for (const Work& work : b.groups.front()) work();
    b.groups.pop_front();
  }
}

// Checks and notes a plain write of 16 bytes to shared memory.
inline bool writes_shared(const void* to) {
  State& s = state();
  const std::size_t at = static_cast<const unsigned char*>(to) - s.shared;
  if (to < s.shared || at + 16 > s.shared_bytes || at % 16 != 0) {
    report("a write of 16 bytes outside shared memory, or not aligned");
    return false;
  }
  s.unfenced[at / 16] = true;
  s.current->unfenced.push_back(at / 16);
  return true;
}

// The 16 bytes of a wgmma operand that belong to one row of a core matrix.
template <typename T, int kCount>
void wgmma_read(std::size_t at, float (&v)[kCount]) {
  State& s = state();
  if (at + 16 > s.shared_bytes) return report("wgmma reads beyond shared memory");
  if (s.unfenced[at / 16]) return report("wgmma reads what was written without fence.proxy.async");
  T raw[kCount];
  static_assert(sizeof raw == 16);
  std::memcpy(raw, s.shared + at, 16);
  for (int e = 0; e < kCount; ++e) v[e] = static_cast<float>(raw[e]);
}

}  // namespace emulation

#define threadIdx (emulation::state().current->thread)
#define blockIdx (emulation::state().block_index)
#define gridDim (emulation::state().grid_size)
#define blockDim (emulation::state().block_size)
#define FASTSR_SHARED(name) unsigned char* name = emulation::state().shared

inline void __syncthreads() {
  auto& s = emulation::state();
  if (s.fault == emulation::kNoSyncthreads) return;
  if (s.fault == emulation::kDivergentBarrier && s.current->linear == 5) return;
  emulation::meet(s.barriers[0], s.block_size.x);
}
inline void __syncwarp() {
  emulation::gather(0, 1);
}
inline void __threadfence() {}
template <typename V>
V __shfl_xor_sync(unsigned, V v, int mask) {
  return emulation::lane_value<V>(emulation::gather(v, 2), (emulation::state().current->linear % 32) ^ mask);
}
inline int atomicAdd(int* p, int v) {
  const int old = *p;
  *p += v;
  return old;
}

namespace fastsr::cuda {

inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(static_cast<const unsigned char*>(p) - emulation::state().shared);
}

inline int uniform(int v) {
  return v;
}

inline void copy_async(void* to, const void* from, bool real) {
  auto& s = emulation::state();
  if (real && reinterpret_cast<std::uintptr_t>(from) % 16 != 0) emulation::report("cp.async from an unaligned address");
  emulation::issue(s.current->copies, [=] {
    if (!emulation::writes_shared(to)) return;
    real ? std::memcpy(to, from, 16) : std::memset(to, 0, 16);
  });
}
inline void copy_commit() {
  emulation::commit(emulation::state().current->copies);
}
template <int kPending>
void copy_wait() {
  auto& s = emulation::state();
  if (s.fault != emulation::kNoCopyWait) emulation::wait(s.current->copies, kPending);
}

inline void store_shared(void* to, const uint4& v) {
  if (emulation::writes_shared(to)) std::memcpy(to, &v, 16);
}

inline void proxy_fence() {
  auto& s = emulation::state();
  if (s.fault == emulation::kNoProxyFence) return;
  for (const std::size_t piece : s.current->unfenced) s.unfenced[piece] = false;
  s.current->unfenced.clear();
}

inline void named_barrier(int id, int threads) {
  auto& s = emulation::state();
  if (s.fault != emulation::kNoNamedBarrier) emulation::meet(s.barriers[id], threads);
}

// Bits 0..15: arrivals that the phase still needs, 16..31: the count, 63: parity of the phase.
inline void mbarrier_init(std::uint64_t* barrier, int count) {
  *barrier = static_cast<std::uint64_t>(count) << 16 | count;
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(std::uint64_t* barrier) {
  if ((--*barrier & 0xffff) == 0) *barrier = (*barrier ^ 1ull << 63) | (*barrier >> 16 & 0xffff);
}
inline bool mbarrier_ready(const std::uint64_t* barrier, int parity) {
  return *barrier >> 63 != static_cast<std::uint64_t>(parity);
}
inline void mbarrier_wait(std::uint64_t* barrier, int parity) {
  if (emulation::state().fault == emulation::kNoMbarrierWait) return;
  const std::uint64_t mask = 1ull << 63, value = static_cast<std::uint64_t>(parity) << 63;
  if ((*barrier & mask) == value) emulation::block_while(barrier, mask, value);
}

inline void load_matrices(std::uint32_t (&r)[4], const void* row) {
  const auto& rows = emulation::gather(row, 3);
  const int lane = emulation::state().current->linear % 32;
  for (int m = 0; m < 4; ++m) {
    const auto* from = emulation::lane_value<const unsigned char*>(rows, m * 8 + lane / 4);
    const std::size_t at = from - emulation::state().shared;
    if (from < emulation::state().shared || at + 16 > emulation::state().shared_bytes || at % 16 != 0) {
      return emulation::report("ldmatrix reads outside shared memory, or not aligned");
    }
    std::memcpy(&r[m], from + lane % 4 * 4, 4);
  }
}

template <typename T>
void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  struct Fragment {
    T a[4][2], b[2][2];
  } mine;
  std::memcpy(mine.a, a, 16);
  std::memcpy(mine.b[0], &b0, 4);
  std::memcpy(mine.b[1], &b1, 4);
  const auto& all = reinterpret_cast<const unsigned char (&)[32][64]>(emulation::gather(mine, 4));
  const int lane = emulation::state().current->linear % 32;
  for (int k = 0; k < 16; ++k) {
    const int quad = k % 8 / 2, far = k / 8, e = k % 2;
    float row[2], column[2];
    for (int h = 0; h < 2; ++h) {
      row[h] = static_cast<float>(reinterpret_cast<const Fragment*>(all[lane / 4 * 4 + quad])->a[h + 2 * far][e]);
      const int n = lane % 4 * 2 + h;
      column[h] = static_cast<float>(reinterpret_cast<const Fragment*>(all[n * 4 + quad])->b[far][e]);
    }
    for (int i = 0; i < 4; ++i) d[i] += row[i / 2] * column[i % 2];
  }
}

inline std::uint64_t wgmma_operand(std::uint32_t address, std::uint32_t leading, std::uint32_t stride) {
  if (address % 16 != 0 || leading % 16 != 0 || stride % 16 != 0)
    emulation::report("a wgmma operand that is not aligned");
  if (emulation::state().fault == emulation::kWrongStride) stride += 16;
  return (address & 0x3ffff) >> 4 | static_cast<std::uint64_t>(leading & 0x3ffff) >> 4 << 16 |
         static_cast<std::uint64_t>(stride & 0x3ffff) >> 4 << 32;
}

inline void wgmma_fence() {
  emulation::gather(0, 5);
}
inline void wgmma_commit() {
  emulation::commit(emulation::state().current->products);
}
template <int kPending>
void wgmma_wait() {
  auto& s = emulation::state();
  if (s.fault != emulation::kNoWgmmaWait) emulation::wait(s.current->products, kPending);
  emulation::gather(0, 6);  // the lanes go on together
}
template <int>
void registers_up() {}
template <int>
void registers_down() {}

template <typename T, int kN>
struct Wgmma {
  static void run(float (&d)[kN / 2], std::uint64_t a, std::uint64_t b) {
    float* to = d;
    emulation::issue(emulation::state().current->products,
                     [to, a, b, thread = emulation::state().current->linear % 128] { product(to, a, b, thread); });
  }

 private:
  static constexpr int kHalf = 16 / sizeof(T);  // of K

  static void read_row(std::uint64_t operand, int row, float (&v)[2][kHalf]) {
    const std::size_t start = (operand & 0x3fff) << 4, leading = (operand >> 16 & 0x3fff) << 4,
                      stride = (operand >> 32 & 0x3fff) << 4;
    for (int k = 0; k < 2; ++k) emulation::wgmma_read<T>(start + row / 8 * stride + k * leading + row % 8 * 16, v[k]);
  }

  static void product(float* d, std::uint64_t a, std::uint64_t b, int thread) {
    const int lane = thread % 32;
    float rows[2][2][kHalf], column[2][kHalf];
    for (int h = 0; h < 2; ++h) read_row(a, thread / 32 * 16 + lane / 4 + 8 * h, rows[h]);
    for (int j = 0; j < kN / 8; ++j) {
      for (int e = 0; e < 2; ++e) {
        read_row(b, j * 8 + lane % 4 * 2 + e, column);
        for (int h = 0; h < 2; ++h) {
          float sum = 0;
          for (int k = 0; k < 2 * kHalf; ++k) sum += rows[h][k / kHalf][k % kHalf] * column[k / kHalf][k % kHalf];
          d[j * 4 + h * 2 + e] += sum;
        }
      }
    }
  }
};

template <typename... Parameters, typename... Args>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, void*, const Args&... args) {
  return emulation::run_grid(grid, threads, shared_bytes, [&] { kernel(args...); });
}

}  // namespace fastsr::cuda
