// Register blocks: a few pixels times up to four blocks of sixteen outputs, summed over inputs that lie in runs.
#pragma once

#include "cpu/conv/blocks.h"
#include "cpu/simd.h"

namespace fastsr::cpu {
namespace {

// What a register block sums over: `rows` rows of `runs` runs of `length` inputs each, all with contiguous weights, in
// packed order [row][run][input][output]. Pixels, rows and runs are steps in elements apart.
struct Walk {
  std::int64_t pixel, row, run;
  int rows, runs, length;
};

// acc[i][j] += a[i * pixel + k] * w[k][16 j ..] over k < length. The loops over registers are unrolled whole: an array
// that is not, lives on the stack.
template <int kPixels, int kBlocks>
FASTSR_INLINE void add_products(const float* a, std::int64_t pixel, const float* w, int length,
                                Vec (&acc)[kPixels][kBlocks]) {
  for (int k = 0; k < length; ++k) {
    Vec b[kBlocks];
    FASTSR_UNROLL for (int j = 0; j < kBlocks; ++j) b[j] = load(w + kLanes * j);
    w += kLanes * kBlocks;
    FASTSR_UNROLL for (int i = 0; i < kPixels; ++i) {
      const Vec x = all(a[i * pixel + k]);
      FASTSR_UNROLL for (int j = 0; j < kBlocks; ++j) acc[i][j] = fma(x, b[j], acc[i][j]);
    }
  }
}

#if defined(__AVX512BF16__)
// Pairs of inputs, with weights [k / 2][output][2]; length is even.
template <int kPixels, int kBlocks>
FASTSR_INLINE void add_products(const bf16* a, std::int64_t pixel, const bf16* w, int length,
                                Vec (&acc)[kPixels][kBlocks]) {
  for (int k = 0; k < length; k += 2) {
    __m512i b[kBlocks];
    FASTSR_UNROLL for (int j = 0; j < kBlocks; ++j) b[j] = _mm512_loadu_si512(w + 2 * kLanes * j);
    w += 2 * kLanes * kBlocks;
    FASTSR_UNROLL for (int i = 0; i < kPixels; ++i) {
      int pair;
      std::memcpy(&pair, a + i * pixel + k, 4);
      const __m512i x = _mm512_set1_epi32(pair);
      FASTSR_UNROLL for (int j = 0; j < kBlocks; ++j) {
        acc[i][j] = _mm512_dpbf16_ps(acc[i][j], reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(b[j]));
      }
    }
  }
}
#endif

// Sums for kPixels pixels from a on, stored as [pixel][block][16].
template <int kPixels, int kBlocks, typename T>
static inline void sum_block(const T* a, const Walk& walk, const T* w, bool first, float* sums) {
  Vec acc[kPixels][kBlocks];
  FASTSR_UNROLL for (int i = 0; i < kPixels; ++i) {
    FASTSR_UNROLL for (int j = 0; j < kBlocks; ++j) acc[i][j] = zero();
  }
  for (int row = 0; row < walk.rows; ++row) {
    const T* p = a + row * walk.row;
    for (int run = 0; run < walk.runs; ++run) {
      add_products<kPixels, kBlocks>(p, walk.pixel, w, walk.length, acc);
      w += static_cast<std::int64_t>(walk.length) * kLanes * kBlocks;
      p += walk.run;
    }
  }
  FASTSR_UNROLL for (int i = 0; i < kPixels; ++i) {
    FASTSR_UNROLL for (int j = 0; j < kBlocks; ++j) {
      float* at = sums + (i * kBlocks + j) * kLanes;
      store(at, first ? acc[i][j] : add(load(at), acc[i][j]));
    }
  }
}

// Pixels of the largest register block, by the number of output blocks: as many accumulators as leave registers for the
// weights.
template <int kBlocks>
constexpr int kMostPixels =
#if defined(__AVX512F__)
    kBlocks == 4 ? 6 : kBlocks == 3 ? 8 : kBlocks == 2 ? 12 : 14;
#else
    6;
#endif

// The smallest register block that is instantiated for so many pixels; a block may compute pixels that nobody wants.
template <int kBlocks, typename T>
FASTSR_INLINE void sum_pixels(int pixels, const T* a, const Walk& walk, const T* w, bool first, float* sums) {
  constexpr int kMost = kMostPixels<kBlocks>;
  if (pixels > kMost * 2 / 3) return sum_block<kMost, kBlocks>(a, walk, w, first, sums);
  if (pixels > kMost / 3) return sum_block<kMost * 2 / 3, kBlocks>(a, walk, w, first, sums);
  if (pixels > 1) return sum_block<kMost / 3, kBlocks>(a, walk, w, first, sums);
  return sum_block<1, kBlocks>(a, walk, w, first, sums);
}

// Finishes and stores `pixels` pixels from (y, x) on, of one sink; `sums` as sum_block leaves them, from the sink's
// block on. Returns the sum of what was stored if kSums.
template <bool kSums>
static inline void finish_pixels(const Sink& sink, const float* sums, int stride, int pixels, std::int64_t y,
                                 std::int64_t x, float* partial) {
  alignas(64) float moved[kLanes * 2];
  Vec total = zero();
  for (int i = 0; i < pixels; ++i) {
    Vec v[1] = {load(sums + i * stride)};
    if (sink.lane != 0) {
      store(moved, v[0]);
      store(moved + kLanes, zero());
      v[0] = load(moved + sink.lane);
    }
    emit<1, kSums>(sink.emit, y, x + i, 1, v, total);
  }
  if constexpr (kSums) {
    const Mask m = first(sink.lanes);
    store(partial + sink.channel, add(load(partial + sink.channel, m), total), m);
  }
}

}  // namespace
}  // namespace fastsr::cpu
