// Arithmetic alone, out of registers: what a processor can do at most, for comparison with what kernels reach.
#pragma once

#include "cpu/simd.h"
#include "cpu/steps/steps.h"

namespace fastsr::cpu {
namespace {

// Independent chains of operations: enough that two units of six cycles' latency never wait, and all in registers.
#if defined(__AVX512F__)
constexpr int kChains = 24;
#else
constexpr int kChains = 6;  // of two registers each; there are sixteen in all
#endif

// Keeps a value in a register and the compiler from knowing it.
#if defined(__AVX512F__)
FASTSR_INLINE void opaque(Vec& v) { __asm__ volatile("" : "+v"(v)); }
#else
FASTSR_INLINE void opaque(Vec& v) { __asm__ volatile("" : "+x"(v.low), "+x"(v.high)); }
#endif

// Returns the number of floating-point operations.
static double peak_fma(std::int64_t passes) {
  Vec sums[kChains], factor = all(0.5f);
  FASTSR_UNROLL for (int i = 0; i < kChains; ++i) sums[i] = all(1.0f + static_cast<float>(i));
  for (std::int64_t p = 0; p < passes; ++p) {
    FASTSR_UNROLL for (int i = 0; i < kChains; ++i) {
      sums[i] = fma(sums[i], factor, factor);
      opaque(sums[i]);
    }
  }
  return 2.0 * kLanes * kChains * static_cast<double>(passes);
}

#if defined(__AVX512BF16__)
static double peak_bf16(std::int64_t passes) {
  Vec sums[kChains];
  const __m512bh factor = _mm512_cvtne2ps_pbh(all(0.5f), all(0.5f));
  FASTSR_UNROLL for (int i = 0; i < kChains; ++i) sums[i] = zero();
  for (std::int64_t p = 0; p < passes; ++p) {
    FASTSR_UNROLL for (int i = 0; i < kChains; ++i) {
      sums[i] = _mm512_dpbf16_ps(sums[i], factor, factor);
      opaque(sums[i]);
    }
  }
  return 4.0 * kLanes * kChains * static_cast<double>(passes);
}
#else
constexpr double (*peak_bf16)(std::int64_t) = nullptr;
#endif

}  // namespace
}  // namespace fastsr::cpu
