// Copies between layouts and types, and maps scaled by channel.
//
// Between a layout of planes (pixel stride 1, torch's contiguous one) and one of pixels (channel stride 1), squares of
// sixteen channels by sixteen pixels are transposed in registers: each cache line is read once and written once.
#pragma once

#include "cpu/simd.h"
#include "cpu/steps/steps.h"

namespace fastsr::cpu {
namespace {

constexpr std::int64_t kPiece = 256;  // pixels of a task

FASTSR_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
FASTSR_INLINE std::int64_t pieces(std::int64_t length) { return (length + kPiece - 1) / kPiece; }

#if defined(__AVX512F__)

FASTSR_INLINE __m512d as_double(Vec v) { return _mm512_castps_pd(v); }
FASTSR_INLINE Vec as_float(__m512d v) { return _mm512_castpd_ps(v); }

FASTSR_INLINE void transpose(Vec (&v)[16]) {
  Vec a[16], b[16];
  FASTSR_UNROLL for (int i = 0; i < 16; i += 2) {  // pairs of rows, then fours, within each quarter of a register
    a[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  FASTSR_UNROLL for (int i = 0; i < 16; i += 4) {
    FASTSR_UNROLL for (int k = 0; k < 2; ++k) {
      b[i + 2 * k] = as_float(_mm512_unpacklo_pd(as_double(a[i + k]), as_double(a[i + k + 2])));
      b[i + 2 * k + 1] = as_float(_mm512_unpackhi_pd(as_double(a[i + k]), as_double(a[i + k + 2])));
    }
  }
  FASTSR_UNROLL for (int k = 0; k < 4; ++k) {  // quarters between registers
    const Vec even_low = _mm512_shuffle_f32x4(b[k], b[k + 4], 0x88), odd_low = _mm512_shuffle_f32x4(b[k], b[k + 4], 0xdd);
    const Vec even_high = _mm512_shuffle_f32x4(b[k + 8], b[k + 12], 0x88);
    const Vec odd_high = _mm512_shuffle_f32x4(b[k + 8], b[k + 12], 0xdd);
    v[k] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    v[k + 4] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    v[k + 8] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    v[k + 12] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
}

#else

FASTSR_INLINE void transpose8(__m256 (&v)[8]) {
  __m256 a[8], b[8];
  FASTSR_UNROLL for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  FASTSR_UNROLL for (int i = 0; i < 8; i += 4) {
    FASTSR_UNROLL for (int k = 0; k < 2; ++k) {
      b[i + 2 * k] = _mm256_shuffle_ps(a[i + k], a[i + k + 2], 0x44);
      b[i + 2 * k + 1] = _mm256_shuffle_ps(a[i + k], a[i + k + 2], 0xee);
    }
  }
  FASTSR_UNROLL for (int k = 0; k < 4; ++k) {
    v[k] = _mm256_permute2f128_ps(b[k], b[k + 4], 0x20);
    v[k + 4] = _mm256_permute2f128_ps(b[k], b[k + 4], 0x31);
  }
}

FASTSR_INLINE void transpose(Vec (&v)[16]) {
  __m256 corner[4][8];  // rows 0..7 low, rows 0..7 high, rows 8..15 low, rows 8..15 high
  FASTSR_UNROLL for (int i = 0; i < 8; ++i) {
    corner[0][i] = v[i].low;
    corner[1][i] = v[i].high;
    corner[2][i] = v[i + 8].low;
    corner[3][i] = v[i + 8].high;
  }
  FASTSR_UNROLL for (int k = 0; k < 4; ++k) transpose8(corner[k]);
  FASTSR_UNROLL for (int i = 0; i < 8; ++i) {
    v[i] = {corner[0][i], corner[2][i]};
    v[i + 8] = {corner[1][i], corner[3][i]};
  }
}

#endif

// `rows` rows of `lanes` values, both at most sixteen, become `lanes` rows of `rows` values.
template <typename From, typename To>
FASTSR_INLINE void transpose_square(const From* from, std::int64_t from_row, To* to, std::int64_t to_row, int rows,
                                    int lanes) {
  Vec v[16];
  if (rows == kLanes && lanes == kLanes) {
    FASTSR_UNROLL for (int i = 0; i < 16; ++i) v[i] = load(from + i * from_row);
    transpose(v);
    FASTSR_UNROLL for (int i = 0; i < 16; ++i) store(to + i * to_row, v[i]);
    return;
  }
  const Mask in = first(lanes), out = first(rows);
  FASTSR_UNROLL for (int i = 0; i < 16; ++i) v[i] = i < rows ? load(from + i * from_row, in) : zero();
  transpose(v);
  FASTSR_UNROLL for (int i = 0; i < 16; ++i) {
    if (i < lanes) store(to + i * to_row, v[i], out);
  }
}

// `channels` planes become `length` pixels.
template <typename From, typename To>
static void planes_to_pixels(const From* from, std::int64_t plane, To* to, std::int64_t pixel, std::int64_t channels,
                             std::int64_t length) {
  for (std::int64_t k = 0; k < channels; k += kLanes) {
    for (std::int64_t x = 0; x < length; x += kLanes) {
      transpose_square(from + k * plane + x, plane, to + x * pixel + k, pixel,
                       static_cast<int>(smaller(channels - k, kLanes)), static_cast<int>(smaller(length - x, kLanes)));
    }
  }
}

// The other way. Planes are often a multiple of a cache's way apart, so only sixteen are written at a time.
template <typename From, typename To>
static void pixels_to_planes(const From* from, std::int64_t pixel, To* to, std::int64_t plane, std::int64_t channels,
                             std::int64_t length) {
  for (std::int64_t k = 0; k < channels; k += kLanes) {
    for (std::int64_t x = 0; x < length; x += kLanes) {
      transpose_square(from + x * pixel + k, pixel, to + k * plane + x, plane,
                       static_cast<int>(smaller(length - x, kLanes)), static_cast<int>(smaller(channels - k, kLanes)));
    }
  }
}

template <typename From, typename To>
static void copy_line(const From* from, To* to, std::int64_t length) {
  std::int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) store(to + i, load(from + i));
  if (i < length) {
    const Mask rest = first(static_cast<int>(length - i));
    store(to + i, load(from + i, rest), rest);
  }
}

// A copy with as few dimensions as its strides allow.
struct CopyPlan {
  std::int64_t rows, length;          // of an image: its pixels are one row if they can be
  std::int64_t from_row, to_row;      // strides
  std::int64_t pieces;                // of a row
  enum { kLines, kPixels, kToPixels, kToPlanes, kAny } how;  // kLines: rows of each plane, kPixels: channels of each pixel
};

static CopyPlan plan_copy(const Copy& c) {
  CopyPlan p = {c.height, c.width, c.from.row, c.to.row, 1, CopyPlan::kAny};
  if (c.height == 1 || (c.from.row == c.width * c.from.pixel && c.to.row == c.width * c.to.pixel)) {
    p.rows = 1;
    p.length = c.height * c.width;
  }
  const bool from_planes = c.from.pixel == 1 || p.length == 1, to_planes = c.to.pixel == 1 || p.length == 1;
  const bool from_pixels = c.from.channel == 1 || c.channels == 1, to_pixels = c.to.channel == 1 || c.channels == 1;
  if (from_pixels && to_pixels && c.channels > 1) {
    p.how = CopyPlan::kPixels;
  } else if (from_planes && to_planes) {
    p.how = CopyPlan::kLines;
  } else if (from_planes && to_pixels) {
    p.how = CopyPlan::kToPixels;
  } else if (from_pixels && to_planes) {
    p.how = CopyPlan::kToPlanes;
  }
  p.pieces = pieces(p.length);
  return p;
}

template <typename From, typename To>
static void copy_piece(const Copy& c, const CopyPlan& p, std::int64_t n, std::int64_t row, std::int64_t x,
                       std::int64_t length) {
  const From* from =
      reinterpret_cast<const From*>(c.from.data) + n * c.from.image + row * p.from_row + x * c.from.pixel;
  To* to = reinterpret_cast<To*>(c.to.data) + n * c.to.image + row * p.to_row + x * c.to.pixel;
  switch (p.how) {
    case CopyPlan::kPixels:
      if (c.from.pixel == c.channels && c.to.pixel == c.channels) return copy_line(from, to, length * c.channels);
      for (std::int64_t i = 0; i < length; ++i) copy_line(from + i * c.from.pixel, to + i * c.to.pixel, c.channels);
      return;
    case CopyPlan::kLines:
      for (std::int64_t k = 0; k < c.channels; ++k) copy_line(from + k * c.from.channel, to + k * c.to.channel, length);
      return;
    case CopyPlan::kToPixels:
      return planes_to_pixels(from, c.from.channel, to, c.to.pixel, c.channels, length);
    case CopyPlan::kToPlanes:
      return pixels_to_planes(from, c.from.pixel, to, c.to.channel, c.channels, length);
    case CopyPlan::kAny:
      for (std::int64_t k = 0; k < c.channels; ++k) {
        for (std::int64_t i = 0; i < length; ++i) {
          copy_line(from + k * c.from.channel + i * c.from.pixel, to + k * c.to.channel + i * c.to.pixel, 1);
        }
      }
  }
}

static std::int64_t copy_tasks(const Copy& c) {
  const CopyPlan p = plan_copy(c);
  return c.n * p.rows * p.pieces;
}

static std::int64_t copy_scratch(const Copy&) { return 0; }

static void copy_run(const Copy& c, std::int64_t task, void*) {
  const CopyPlan p = plan_copy(c);
  const std::int64_t x = task % p.pieces * kPiece, row = task / p.pieces % p.rows, n = task / p.pieces / p.rows;
  const std::int64_t length = smaller(kPiece, p.length - x);
  if (c.from.type == kFloat) {
    c.to.type == kFloat ? copy_piece<float, float>(c, p, n, row, x, length)
                        : copy_piece<float, bf16>(c, p, n, row, x, length);
  } else {
    c.to.type == kFloat ? copy_piece<bf16, float>(c, p, n, row, x, length)
                        : copy_piece<bf16, bf16>(c, p, n, row, x, length);
  }
}

constexpr StepKernel<Copy> kCopy = {copy_tasks, copy_scratch, copy_run};

template <typename From, typename To>
static void scale_piece(const From* from, std::int64_t from_pixel, To* to, std::int64_t to_pixel, const float* scale,
                        std::int64_t channels, std::int64_t length) {
  for (std::int64_t k = 0; k < channels; k += kLanes) {
    const Mask m = first(static_cast<int>(smaller(channels - k, kLanes)));
    const Vec s = load(scale + k, m);
    if (channels - k >= kLanes) {
      for (std::int64_t x = 0; x < length; ++x) store(to + x * to_pixel + k, mul(s, load(from + x * from_pixel + k)));
    } else {
      for (std::int64_t x = 0; x < length; ++x) {
        store(to + x * to_pixel + k, mul(s, load(from + x * from_pixel + k, m)), m);
      }
    }
  }
}

static std::int64_t scale_tasks(const Scale& s) { return s.n * s.height * pieces(s.width); }
static std::int64_t scale_scratch(const Scale&) { return 0; }

static void scale_run(const Scale& s, std::int64_t task, void*) {
  const std::int64_t count = pieces(s.width), x = task % count * kPiece, row = task / count % s.height;
  const std::int64_t n = task / count / s.height, length = smaller(kPiece, s.width - x);
  const std::int64_t from = n * s.in.image + row * s.in.row + x * s.in.pixel;
  const std::int64_t to = n * s.out.image + row * s.out.row + x * s.out.pixel;
  const float* scale = reinterpret_cast<const float*>(s.scale.data) + n * s.in.channels;
  const float* from_float = reinterpret_cast<const float*>(s.in.data) + from;
  const bf16* from_bf16 = reinterpret_cast<const bf16*>(s.in.data) + from;
  float* to_float = reinterpret_cast<float*>(s.out.data) + to;
  bf16* to_bf16 = reinterpret_cast<bf16*>(s.out.data) + to;
  const auto run = [&](auto* in, auto* out) {
    scale_piece(in, s.in.pixel, out, s.out.pixel, scale, s.in.channels, length);
  };
  if (s.in.type == kFloat) {
    s.out.type == kFloat ? run(from_float, to_float) : run(from_float, to_bf16);
  } else {
    s.out.type == kFloat ? run(from_bf16, to_float) : run(from_bf16, to_bf16);
  }
}

constexpr StepKernel<Scale> kScale = {scale_tasks, scale_scratch, scale_run};

}  // namespace
}  // namespace fastsr::cpu
