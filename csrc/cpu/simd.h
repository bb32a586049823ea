// Sixteen floats at once: one AVX-512 register, or two AVX2 registers. Kernels are written once on `Vec` and compiled
// once a level, each file with its own flags. Everything here has internal linkage, so that the linker can never put a
// copy made for one level into code of another.
//
// A `Mask` selects the first lanes of a vector: channels come in sixteens, and the last sixteen may be incomplete.
#pragma once

#if !defined(__AVX2__)
#error "simd.h belongs in files compiled for AVX2 or AVX-512"
#endif

#include <immintrin.h>

#include <cstdint>

#define FASTSR_INLINE static inline __attribute__((always_inline))
// For unrolled code, which needs all registers to itself.
#define FASTSR_NOINLINE static __attribute__((noinline))
#define FASTSR_UNROLL _Pragma("GCC unroll 64")

namespace fastsr::cpu {
namespace {

using bf16 = std::uint16_t;  // the upper half of a float

constexpr int kLanes = 16;

#if defined(__AVX512F__)

using Vec = __m512;
using Mask = __mmask16;

FASTSR_INLINE Mask first(int lanes) { return static_cast<Mask>((1u << lanes) - 1); }
FASTSR_INLINE Vec zero() { return _mm512_setzero_ps(); }
FASTSR_INLINE Vec all(float x) { return _mm512_set1_ps(x); }
FASTSR_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
FASTSR_INLINE Vec load(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
FASTSR_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
FASTSR_INLINE void store(float* p, Vec v, Mask m) { _mm512_mask_storeu_ps(p, m, v); }
FASTSR_INLINE void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }  // p is aligned to 64 bytes
FASTSR_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
FASTSR_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
FASTSR_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
FASTSR_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }    // a * b + c
FASTSR_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
// The instructions return their second operand where one is NaN: a NaN in v stays.
FASTSR_INLINE Vec at_least(Vec v, Vec floor) { return _mm512_max_ps(floor, v); }
FASTSR_INLINE Vec positive(Vec v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }
FASTSR_INLINE Vec negative(Vec v) { return _mm512_min_ps(_mm512_setzero_ps(), v); }
FASTSR_INLINE float sum(Vec v) { return _mm512_reduce_add_ps(v); }
// Lanes n, n + 1, ... of v at the front; what follows is undefined.
FASTSR_INLINE Vec from_lane(Vec v, int n) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(n)), v);
}

FASTSR_INLINE Vec widen(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }
FASTSR_INLINE Vec load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
FASTSR_INLINE Vec load(const bf16* p, Mask m) { return widen(_mm256_maskz_loadu_epi16(m, p)); }

#if defined(__AVX512BF16__)
FASTSR_INLINE __m256i narrow(Vec v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
#else
// Round to nearest even; a NaN keeps its upper half and becomes quiet.
FASTSR_INLINE __m256i narrow(Vec v) {
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
}
#endif
FASTSR_INLINE void store(bf16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
FASTSR_INLINE void store(bf16* p, Vec v, Mask m) { _mm256_mask_storeu_epi16(p, m, narrow(v)); }

#else  // AVX2

struct Vec {
  __m256 low, high;
};
using Mask = int;  // the number of lanes

FASTSR_INLINE Mask first(int lanes) { return lanes; }
FASTSR_INLINE __m256i lanes_below(int count) {  // all ones in lanes 0 .. count - 1 of eight
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FASTSR_INLINE Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
FASTSR_INLINE Vec all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
FASTSR_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
FASTSR_INLINE Vec load(const float* p, Mask m) {
  return {_mm256_maskload_ps(p, lanes_below(m)), _mm256_maskload_ps(p + 8, lanes_below(m - 8))};
}
FASTSR_INLINE void store(float* p, Vec v) {
  _mm256_storeu_ps(p, v.low);
  _mm256_storeu_ps(p + 8, v.high);
}
FASTSR_INLINE void store(float* p, Vec v, Mask m) {
  _mm256_maskstore_ps(p, lanes_below(m), v.low);
  _mm256_maskstore_ps(p + 8, lanes_below(m - 8), v.high);
}
FASTSR_INLINE void stream(float* p, Vec v) {  // p is aligned to 32 bytes
  _mm256_stream_ps(p, v.low);
  _mm256_stream_ps(p + 8, v.high);
}
FASTSR_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
FASTSR_INLINE Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
FASTSR_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
FASTSR_INLINE Vec fma(Vec a, Vec b, Vec c) {  // a * b + c
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
FASTSR_INLINE Vec fnma(Vec a, Vec b, Vec c) {  // c - a * b
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
// The instructions return their second operand where one is NaN: a NaN in v stays.
FASTSR_INLINE Vec at_least(Vec v, Vec floor) {
  return {_mm256_max_ps(floor.low, v.low), _mm256_max_ps(floor.high, v.high)};
}
FASTSR_INLINE Vec positive(Vec v) {
  return {_mm256_max_ps(_mm256_setzero_ps(), v.low), _mm256_max_ps(_mm256_setzero_ps(), v.high)};
}
FASTSR_INLINE Vec negative(Vec v) {
  return {_mm256_min_ps(_mm256_setzero_ps(), v.low), _mm256_min_ps(_mm256_setzero_ps(), v.high)};
}
FASTSR_INLINE Vec from_lane(Vec v, int n) {  // lanes n, n + 1, ... of v at the front; what follows is undefined
  alignas(32) float lanes[2 * kLanes];
  store(lanes, v);
  store(lanes + kLanes, v);
  return load(lanes + n);
}
FASTSR_INLINE float sum(Vec v) {
  const __m256 eight = _mm256_add_ps(v.low, v.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

FASTSR_INLINE __m256 widen(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
FASTSR_INLINE Vec load(const bf16* p) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {widen(_mm256_castsi256_si128(both)), widen(_mm256_extracti128_si256(both, 1))};
}
FASTSR_INLINE Vec load(const bf16* p, Mask m) {
  alignas(32) bf16 copy[kLanes] = {};
  for (int i = 0; i < m; ++i) copy[i] = p[i];
  return load(copy);
}
// Round to nearest even; a NaN keeps its upper half and becomes quiet.
FASTSR_INLINE __m256i narrow8(__m256 v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
FASTSR_INLINE __m256i narrow(Vec v) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(narrow8(v.low), narrow8(v.high)), 0xd8);
}
FASTSR_INLINE void store(bf16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
FASTSR_INLINE void store(bf16* p, Vec v, Mask m) {
  alignas(32) bf16 copy[kLanes];
  _mm256_store_si256(reinterpret_cast<__m256i*>(copy), narrow(v));
  for (int i = 0; i < m; ++i) p[i] = copy[i];
}

#endif

}  // namespace
}  // namespace fastsr::cpu
