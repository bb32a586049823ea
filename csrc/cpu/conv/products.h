// Register blocks: a few pixels times up to four blocks of sixteen outputs, summed over inputs that lie in runs.
#pragma once

#include "cpu/conv/blocks.h"
#include "cpu/simd.h"

namespace fastsr::cpu {
namespace {

// What a register block sums over: `rows` rows of `length` contiguous inputs each, with contiguous weights in the order
// [row][input][output]. Neighbouring pixels and rows are so many elements apart.
struct Walk {
  std::int64_t pixel, row;
  int rows, length;
};

// Addresses of neighbouring pixels: one pointer for each three of them, so that the others are base + step * 1 or 2 in
// an instruction's own arithmetic. The compiler would keep one pointer for each.
template <int kPixels, typename T>
struct Rows {
  static constexpr int kPointers = (kPixels + 2) / 3;
  const T* at[kPointers];
  std::int64_t step;

  Rows(const T* a, std::int64_t step) : step(step) {
    FASTSR_UNROLL for (int i = 0; i < kPointers; ++i) at[i] = a + 3 * i * step;
  }
};

// acc[i][j] += a[i * pixel + k] * w[k][16 j ..] over k < length. The loops over registers are unrolled whole: an array
// that is not, lives on the stack.
template <int kSteps, int kPixels, int kBlocks>
FASTSR_INLINE void add_steps(Rows<kPixels, float>& rows, const float*& w, Vec (&acc)[kPixels][kBlocks]) {
  FASTSR_UNROLL for (int k = 0; k < kSteps; ++k) {
    Vec b[kBlocks];
    FASTSR_UNROLL for (int j = 0; j < kBlocks; ++j) b[j] = load(w + (k * kBlocks + j) * kLanes);
    FASTSR_UNROLL for (int i = 0; i < kPixels; ++i) {
      const Vec x = all(rows.at[i / 3][i % 3 * rows.step + k]);
      FASTSR_UNROLL for (int j = 0; j < kBlocks; ++j) acc[i][j] = fma(x, b[j], acc[i][j]);
    }
  }
  w += kSteps * kBlocks * kLanes;
  FASTSR_UNROLL for (int i = 0; i < Rows<kPixels, float>::kPointers; ++i) {
    rows.at[i] += kSteps;
    asm volatile("" : "+r"(rows.at[i]));
  }
}

#if defined(__AVX512BF16__)
using Pair __attribute__((may_alias, aligned(2))) = int;

// acc + b * x for pairs. Written out because the compiler copies the accumulator of the intrinsic to and fro, and does
// not know that the instruction can broadcast its operand.
FASTSR_INLINE void dot(Vec& acc, __m512i b, __m512i x) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(b), "v"(x));
}
FASTSR_INLINE void dot(Vec& acc, __m512i b, const Pair& x) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(b), "m"(x));
}

// Pairs of inputs, with weights [pair][output][2].
template <int kSteps, int kPixels, int kBlocks>
FASTSR_INLINE void add_steps(Rows<kPixels, bf16>& rows, const bf16*& w, Vec (&acc)[kPixels][kBlocks]) {
  FASTSR_UNROLL for (int k = 0; k < kSteps; ++k) {
    __m512i b[kBlocks];
    FASTSR_UNROLL for (int j = 0; j < kBlocks; ++j) b[j] = _mm512_loadu_si512(w + (k * kBlocks + j) * 2 * kLanes);
    FASTSR_UNROLL for (int i = 0; i < kPixels; ++i) {
      const Pair& pair = *reinterpret_cast<const Pair*>(rows.at[i / 3] + i % 3 * rows.step + 2 * k);
      if constexpr (kBlocks == 1) {
        dot(acc[i][0], b[0], pair);
      } else {
        const __m512i x = _mm512_set1_epi32(pair);
        FASTSR_UNROLL for (int j = 0; j < kBlocks; ++j) dot(acc[i][j], b[j], x);
      }
    }
  }
  w += kSteps * kBlocks * 2 * kLanes;
  FASTSR_UNROLL for (int i = 0; i < Rows<kPixels, bf16>::kPointers; ++i) {
    rows.at[i] += 2 * kSteps;
    asm volatile("" : "+r"(rows.at[i]));
  }
}
#endif

// length is even for bfloat16, whose inputs are multiplied in pairs.
template <int kPixels, int kBlocks, typename T>
FASTSR_INLINE void add_products(const T* a, std::int64_t pixel, const T* w, int length, Vec (&acc)[kPixels][kBlocks]) {
  Rows<kPixels, T> rows(a, pixel);
  int steps = sizeof(T) == 4 ? length : length / 2;
  for (; steps >= 4; steps -= 4) add_steps<4>(rows, w, acc);
  for (; steps > 0; --steps) add_steps<1>(rows, w, acc);
}

// Sums for kPixels pixels from a on, stored as [pixel][block][16].
template <int kPixels, int kBlocks, typename T>
static inline void sum_block(const T* a, const Walk& walk, const T* w, bool first, float* sums) {
  Vec acc[kPixels][kBlocks];
  FASTSR_UNROLL for (int i = 0; i < kPixels; ++i) {
    FASTSR_UNROLL for (int j = 0; j < kBlocks; ++j) acc[i][j] = zero();
  }
  for (int row = 0; row < walk.rows; ++row) {
    add_products<kPixels, kBlocks>(a, walk.pixel, w, walk.length, acc);
    a += walk.row;
    w += static_cast<std::int64_t>(walk.length) * kLanes * kBlocks;
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
    kBlocks == 4   ? 6
    : kBlocks == 3 ? 8
    : kBlocks == 2 ? 12
                   : 24;
#else
    6;
#endif

FASTSR_INLINE int most_pixels(int blocks) {
#if defined(__AVX512F__)
  if (blocks == 4) return kMostPixels<4>;
  if (blocks == 3) return kMostPixels<3>;
  if (blocks == 2) return kMostPixels<2>;
#endif
  return kMostPixels<1>;
}

// The smallest register block that is instantiated for so many pixels; a block may compute pixels that nobody wants.
template <int kBlocks, typename T>
FASTSR_INLINE void sum_pixels(int pixels, const T* a, const Walk& walk, const T* w, bool first, float* sums) {
  constexpr int kMost = kMostPixels<kBlocks>;
  if (pixels > kMost * 2 / 3) return sum_block<kMost, kBlocks>(a, walk, w, first, sums);
  if (pixels > kMost / 3) return sum_block<kMost * 2 / 3, kBlocks>(a, walk, w, first, sums);
  if (pixels > 1) return sum_block<kMost / 3, kBlocks>(a, walk, w, first, sums);
  return sum_block<1, kBlocks>(a, walk, w, first, sums);
}

}  // namespace
}  // namespace fastsr::cpu
