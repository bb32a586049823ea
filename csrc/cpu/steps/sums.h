// Sums and means over an image, and the gate that channel attention makes of them. Sums are added up in double and in
// an order that depends on the image alone, so the bits do not depend on threads or batch.
#pragma once

#include "cpu/simd.h"
#include "cpu/steps/steps.h"

namespace fastsr::cpu {
namespace {

// Sixteen doubles.
#if defined(__AVX512F__)
using Part = __m512d;
constexpr int kParts = 2;
FASTSR_INLINE Part part_zero() { return _mm512_setzero_pd(); }
FASTSR_INLINE Part part_add(Part a, Part b) { return _mm512_add_pd(a, b); }
FASTSR_INLINE Part part_fma(Part a, Part b, Part c) { return _mm512_fmadd_pd(a, b, c); }
FASTSR_INLINE Part part_load(const double* p) { return _mm512_loadu_pd(p); }
FASTSR_INLINE void part_store(double* p, Part v) { _mm512_storeu_pd(p, v); }
FASTSR_INLINE void widen(Vec v, Part (&parts)[kParts]) {
  parts[0] = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
  parts[1] = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
}
#else
using Part = __m256d;
constexpr int kParts = 4;
FASTSR_INLINE Part part_zero() { return _mm256_setzero_pd(); }
FASTSR_INLINE Part part_add(Part a, Part b) { return _mm256_add_pd(a, b); }
FASTSR_INLINE Part part_fma(Part a, Part b, Part c) { return _mm256_fmadd_pd(a, b, c); }
FASTSR_INLINE Part part_load(const double* p) { return _mm256_loadu_pd(p); }
FASTSR_INLINE void part_store(double* p, Part v) { _mm256_storeu_pd(p, v); }
FASTSR_INLINE void widen(Vec v, Part (&parts)[kParts]) {
  parts[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(v.low));
  parts[1] = _mm256_cvtps_pd(_mm256_extractf128_ps(v.low, 1));
  parts[2] = _mm256_cvtps_pd(_mm256_castps256_ps128(v.high));
  parts[3] = _mm256_cvtps_pd(_mm256_extractf128_ps(v.high, 1));
}
#endif

struct Total {
  Part parts[kParts];
};

FASTSR_INLINE void clear(Total& t) {
  FASTSR_UNROLL for (int i = 0; i < kParts; ++i) t.parts[i] = part_zero();
}

FASTSR_INLINE void add_to(Total& t, Vec v) {
  Part wide[kParts];
  widen(v, wide);
  FASTSR_UNROLL for (int i = 0; i < kParts; ++i) t.parts[i] = part_add(t.parts[i], wide[i]);
}

FASTSR_INLINE void add_to(Total& t, const Total& other) {
  FASTSR_UNROLL for (int i = 0; i < kParts; ++i) t.parts[i] = part_add(t.parts[i], other.parts[i]);
}

FASTSR_INLINE void put_total(const Total& t, double* lanes) {
  FASTSR_UNROLL for (int i = 0; i < kParts; ++i) part_store(lanes + i * (kLanes / kParts), t.parts[i]);
}

FASTSR_INLINE Vec load_map(std::int64_t data, std::int64_t element, int type, Mask m) {
  return type == kFloat ? load(reinterpret_cast<const float*>(data) + element, m)
                        : load(reinterpret_cast<const bf16*>(data) + element, m);
}

// The sum of `count` vectors a stride apart, in four running sums.
static Total sum_line(std::int64_t data, std::int64_t element, std::int64_t stride, std::int64_t count, int type, Mask m) {
  Total sums[4];
  FASTSR_UNROLL for (int k = 0; k < 4; ++k) clear(sums[k]);
  std::int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    FASTSR_UNROLL for (int k = 0; k < 4; ++k) add_to(sums[k], load_map(data, element + (i + k) * stride, type, m));
  }
  for (; i < count; ++i) add_to(sums[0], load_map(data, element + i * stride, type, m));
  add_to(sums[0], sums[1]);
  add_to(sums[2], sums[3]);
  add_to(sums[0], sums[2]);
  return sums[0];
}

FASTSR_INLINE std::int64_t blocks_of(std::int64_t channels) { return (channels + kBlock - 1) / kBlock; }

struct BlockOf {
  std::int64_t n, channel;
  int lanes;
};

FASTSR_INLINE BlockOf block_of(std::int64_t task, std::int64_t channels) {
  const std::int64_t blocks = blocks_of(channels), channel = task % blocks * kBlock;
  return {task / blocks, channel, static_cast<int>(channels - channel < kBlock ? channels - channel : kBlock)};
}

static std::int64_t sums_tasks(const Sums& s) { return s.n * blocks_of(s.in.channels); }
static std::int64_t sums_scratch(const Sums&) { return 0; }

static void sums_run(const Sums& s, std::int64_t task, void*) {
  const BlockOf b = block_of(task, s.in.channels);
  const Mask m = first(b.lanes);
  const std::int64_t base = b.n * s.in.image + b.channel;
  const std::int64_t last_row = base + (s.height - 1) * s.in.row, last_column = base + (s.width - 1) * s.in.pixel;
  const auto line = [&](std::int64_t start, std::int64_t stride, std::int64_t count, double* lanes) {
    put_total(sum_line(s.in.data, start, stride, count, s.in.type, m), lanes);
  };
  double total[kLanes];
  const std::int64_t rows = b.n * s.partial.image + b.channel;
  put_total(sum_line(s.partial.data, rows, s.partial.row, s.rows, kFloat, first(kLanes)), total);
  // What a tap leaves out: index 0 the last row or column, 1 nothing, 2 the first one. Corners are left out twice.
  double without_row[3][kLanes] = {}, without_column[3][kLanes] = {}, corner[3][3][kLanes] = {};
  line(last_row, s.in.pixel, s.width, without_row[0]);
  line(base, s.in.pixel, s.width, without_row[2]);
  line(last_column, s.in.row, s.height, without_column[0]);
  line(base, s.in.row, s.height, without_column[2]);
  line(last_row + (last_column - base), 0, 1, corner[0][0]);
  line(last_row, 0, 1, corner[0][2]);
  line(last_column, 0, 1, corner[2][0]);
  line(base, 0, 1, corner[2][2]);
  float* out = reinterpret_cast<float*>(s.out.data) + (b.n * s.in.channels + b.channel) * 9;
  for (int c = 0; c < b.lanes; ++c) {
    for (int ky = 0; ky < 3; ++ky) {
      for (int kx = 0; kx < 3; ++kx) {
        *out++ = static_cast<float>(total[c] - without_row[ky][c] - without_column[kx][c] + corner[ky][kx][c]);
      }
    }
  }
}

constexpr StepKernel<Sums> kSums = {sums_tasks, sums_scratch, sums_run};

static std::int64_t mean_tasks(const Mean& s) { return s.n * blocks_of(s.in.channels); }
static std::int64_t mean_scratch(const Mean&) { return 0; }

static void mean_run(const Mean& s, std::int64_t task, void*) {
  const BlockOf b = block_of(task, s.in.channels);
  const std::int64_t base = b.n * s.in.image + b.channel;
  Total total;
  clear(total);
  for (std::int64_t y = 0; y < s.height; ++y) {
    add_to(total, sum_line(s.in.data, base + y * s.in.row, s.in.pixel, s.width, s.in.type, first(b.lanes)));
  }
  double lanes[kLanes];
  put_total(total, lanes);
  float* out = reinterpret_cast<float*>(s.out.data) + b.n * s.in.channels + b.channel;
  const double pixels = static_cast<double>(s.height) * static_cast<double>(s.width);
  for (int c = 0; c < b.lanes; ++c) out[c] = static_cast<float>(lanes[c] / pixels);
}

constexpr StepKernel<Mean> kMean = {mean_tasks, mean_scratch, mean_run};

// a: floats, b: doubles.
static double dot(const float* a, const double* b, std::int64_t count) {
  constexpr int kWidth = kLanes / kParts;
  Total sums[2];
  clear(sums[0]);
  clear(sums[1]);
  std::int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    FASTSR_UNROLL for (int k = 0; k < 2; ++k) {
      Part wide[kParts];
      widen(load(a + i + k * kLanes), wide);
      FASTSR_UNROLL for (int p = 0; p < kParts; ++p) {
        sums[k].parts[p] = part_fma(wide[p], part_load(b + i + k * kLanes + p * kWidth), sums[k].parts[p]);
      }
    }
  }
  add_to(sums[0], sums[1]);
  double lanes[kLanes];
  put_total(sums[0], lanes);
  double sum = 0.0;
  for (int k = 0; k < kLanes; ++k) sum += lanes[k];
  for (; i < count; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

static std::int64_t gate_tasks(const Gate& g) { return g.n; }
static std::int64_t gate_scratch(const Gate& g) { return (g.inputs * g.taps + g.outputs + g.hidden) * 8; }

static void gate_run(const Gate& g, std::int64_t n, void* scratch) {
  const auto floats = [](const Floats& f) { return reinterpret_cast<const float*>(f.data); };
  const std::int64_t count = g.inputs * g.taps;
  double* sums = static_cast<double*>(scratch);
  double *mean = sums + count, *hidden = mean + g.outputs;
  for (std::int64_t i = 0; i < count; ++i) sums[i] = floats(g.sums)[n * count + i];
  for (std::int64_t o = 0; o < g.outputs; ++o) {
    mean[o] = sums[o];
    if (g.weight.data != 0) {
      mean[o] = dot(floats(g.weight) + o * count, sums, count) / static_cast<double>(g.pixels);
    }
    if (g.bias.data != 0) mean[o] += floats(g.bias)[o];
  }
  for (std::int64_t r = 0; r < g.hidden; ++r) {
    const double v = floats(g.down_bias)[r] + dot(floats(g.down_weight) + r * g.outputs, mean, g.outputs);
    hidden[r] = v < 0.0 ? 0.0 : v;  // a NaN stays
  }
  float* out = reinterpret_cast<float*>(g.out.data) + n * g.outputs;
  for (std::int64_t o = 0; o < g.outputs; ++o) {
    const double v = floats(g.up_bias)[o] + dot(floats(g.up_weight) + o * g.hidden, hidden, g.hidden);
    out[o] = static_cast<float>(1.0 / (1.0 + __builtin_exp(-v)));
  }
}

constexpr StepKernel<Gate> kGate = {gate_tasks, gate_scratch, gate_run};

}  // namespace
}  // namespace fastsr::cpu
