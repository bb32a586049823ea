// Convolution to a few outputs, such as a network's last: vectorised over input channels.
//
// A register block is a few neighbouring pixels times all outputs, each a vector of sixteen partial sums that are added
// up at the end. Phases of a transposed convolution are outputs too. Inputs are read where they lie, but for blocks
// that reach over the image's edge, which read a small zero-padded copy, and for a prologue, which asks for a copy of
// the whole tile. Arithmetic is always in float32.
#pragma once

#include "cpu/conv/blocks.h"
#include "cpu/conv/direct.h"
#include "cpu/conv/products.h"

namespace fastsr::cpu {
namespace {
namespace few_outputs {

constexpr int kMostOutputs = 4;
constexpr std::int64_t kTileColumns = 192, kTileRows = 32;

// Pixels of a register block, by the number of outputs.
template <int kOutputs>
constexpr int kPixels =
#if defined(__AVX512F__)
    24 / kOutputs;
#else
    kOutputs == 1   ? 6
    : kOutputs == 2 ? 3
                    : 2;
#endif

// Phases are always outputs side by side.
static inline direct::Geometry geometry(const Shape& s) {
  direct::Geometry g = direct::geometry(s);
  g.merged = g.phases > 1;
  const int count = s.cout * g.phases * g.phases;
  g.spare = (count == 1 ? kPixels<1> : count == 2 ? kPixels<2> : count == 3 ? kPixels<3> : kPixels<4>)-1;
  return g;
}

static inline const char* refuse(const Shape& s) {
  if (const char* why = direct::refuse(s)) return why;
  if (s.bf16_products) return "it multiplies in float32 only";
  if (s.groups != 1) return "it has groups";
  const direct::Geometry g = geometry(s);
  const int count = s.cout * g.phases * g.phases;
  if (count > kMostOutputs) return "it has more than four outputs, all phases counted";
  if (g.repeat > 1) return "it enlarges its input and strides";
  if (s.cin < 2 * count) return "its inputs are too few to be vectorised over";
  return nullptr;
}

// Packed: bias and slopes (one block each), the prologue's scale and shift, then weights [tap y][source][tap x]
// [sixteen inputs][output][16], zero where a source has no more channels.
FASTSR_INLINE std::int64_t vectors(const Shape& s) {
  std::int64_t count = 0;
  for (int i = 0; i < s.sources; ++i) count += ceil_div(s.widths[i], kLanes);
  return count;
}

FASTSR_INLINE int taps(const direct::Geometry& g) {
  return g.high - g.low + 1;
}

static inline std::int64_t packed_bytes(const Shape& s) {
  const direct::Geometry g = geometry(s);
  const Outputs out = outputs_of(s, g.phases);
  const std::int64_t weights = static_cast<std::int64_t>(taps(g)) * taps(g) * vectors(s) * out.count * kLanes;
  return 4 * (2 * (out.blocks * kBlock + direct::packed_inputs(s)) + weights);
}

static inline void pack(const Shape& s, const float* weight, const float* bias, const float* slope,
                        const float* pre_scale, const float* pre_shift, void* packed) {
  const direct::Geometry g = geometry(s);
  const Outputs out = outputs_of(s, g.phases);
  const direct::Packed p = direct::unpack(s, out, packed);
  direct::pack_vectors(s, out, bias, slope, pre_scale, pre_shift, p);
  float* to = static_cast<float*>(p.weights);
  for (int y = g.low; y <= g.high; ++y) {
    int begin = 0;
    for (int source = 0; source < s.sources; begin += s.widths[source++]) {
      for (int x = g.low; x <= g.high; ++x) {
        for (int k = 0; k < s.widths[source]; k += kLanes) {
          for (int o = 0; o < out.count; ++o) {
            const int phase = o / s.cout;
            for (int lane = 0; lane < kLanes; ++lane) {
              *to++ = k + lane >= s.widths[source]
                          ? 0.0f
                          : static_cast<float>(direct::tap(s, weight, output_at(s, o), begin + k + lane,
                                                           phase / g.phases, phase % g.phases, y, x));
            }
          }
        }
      }
    }
  }
}

FASTSR_INLINE bool copied(const Shape& s) {
  return s.has_pre || s.pre_relu;
}

// Plan::own: rows of a tile, tiles along y and x, and where in the scratch the sinks, the planes and the copy begin.
enum Own { kRows, kTilesY, kTilesX, kSinksAt, kPlanesAt, kCopyAt };

static inline Plan plan(const Conv& c, int threads) {
  const Shape& s = c.shape;
  const direct::Geometry g = geometry(s);
  const Outputs out = outputs_of(s, g.phases);
  const std::int64_t grid_y = ceil_div(c.out_height, g.phases), grid_x = ceil_div(c.out_width, g.phases);
  const std::int64_t columns = min_of(grid_x, kTileColumns), tiles_x = ceil_div(grid_x, columns);
  const std::int64_t row = direct::copied_columns(g, columns) * vectors(s) * kLanes * 4;
  std::int64_t rows = min_of(grid_y, kTileRows);
  if (copied(s)) {
    while (rows > 1 && direct::copied_rows(g, rows) * row > direct::kTileBytes) --rows;
  }
  rows = max_of(1, min_of(rows, grid_y / ceil_div(4 * threads, c.n * tiles_x)));
  const std::int64_t block = taps(g) * direct::copied_columns(g, g.spare + 1) * vectors(s) * kLanes * 4;
  Plan p = {};
  p.own[kRows] = rows;
  p.own[kTilesY] = ceil_div(grid_y, rows);
  p.own[kTilesX] = tiles_x;
  p.own[kSinksAt] = round_up((kTileColumns + kPixels<1>)*kMostOutputs * 4 + 64, 64);
  p.own[kPlanesAt] = p.own[kSinksAt] + sink_count(out) * static_cast<std::int64_t>(sizeof(Sink));
  p.own[kCopyAt] = p.own[kPlanesAt] + round_up(s.sources * static_cast<std::int64_t>(sizeof(direct::Plane)), 64);
  p.scratch = p.own[kCopyAt] + (copied(s) ? direct::copied_rows(g, rows) * row : block);
  p.tasks = c.n * p.own[kTilesY] * p.own[kTilesX];
  p.partials = grid_y * tiles_x;
  return p;
}

// One source as a register block reads it: the input of its first pixel at the first tap. Strides in elements.
struct Source {
  std::int64_t at;  // address
  std::int64_t row, pixel;
  int type, width;
};

// acc[i][o] += sixteen inputs, or the first of them, times their weights.
template <bool kWhole, int kOutputs, typename From>
FASTSR_INLINE void add_inputs(Rows<kPixels<kOutputs>, From>& rows, Mask mask, const float*& w,
                              Vec (&acc)[kPixels<kOutputs>][kOutputs]) {
  Vec b[kOutputs];
  FASTSR_UNROLL for (int o = 0; o < kOutputs; ++o) b[o] = load(w + o * kLanes);
  FASTSR_UNROLL for (int i = 0; i < kPixels<kOutputs>; ++i) {
    const From* p = rows.at[i / 3] + i % 3 * rows.step;
    Vec x = kWhole ? load(p) : load(p, mask);
#if defined(__AVX512F__)
    if (kOutputs > 1) asm("" : "+v"(x));  // else it is loaded again for each product
#endif
    FASTSR_UNROLL for (int o = 0; o < kOutputs; ++o) acc[i][o] = fma(x, b[o], acc[i][o]);
  }
  FASTSR_UNROLL for (int i = 0; i < Rows<kPixels<kOutputs>, From>::kPointers; ++i) {
    rows.at[i] += kLanes;
    asm volatile("" : "+r"(rows.at[i]));
  }
  w += kOutputs * kLanes;
}

// acc[i][o] += the products of one row of taps, of pixels `stride` pixels apart.
template <int kOutputs, typename From>
FASTSR_INLINE void add_row(const From* a, std::int64_t pixel, int stride, int width, int taps, const float*& w,
                           Vec (&acc)[kPixels<kOutputs>][kOutputs]) {
  const int whole = width / kLanes, rest = width % kLanes;
  const Mask mask = first(rest);
  for (int tap = 0; tap < taps; ++tap, a += pixel) {
    Rows<kPixels<kOutputs>, From> rows(a, stride * pixel);
    for (int k = 0; k < whole; ++k) add_inputs<true, kOutputs>(rows, mask, w, acc);
    if (rest != 0) add_inputs<false, kOutputs>(rows, mask, w, acc);
  }
}

// The sums of four vectors' lanes, added in one order whichever of the four a vector is.
FASTSR_INLINE __m128 sum4(Vec a, Vec b, Vec c, Vec d) {
#if defined(__AVX512F__)
  const Vec ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vec cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const Vec each = add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(each), _mm512_extractf32x8_ps(each, 1));
#else
  auto half = [](Vec v) { return _mm256_add_ps(v.low, v.high); };
  const __m256 a8 = half(a), b8 = half(b), c8 = half(c), d8 = half(d);
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a8, b8), _mm256_unpackhi_ps(a8, b8));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c8, d8), _mm256_unpackhi_ps(c8, d8));
  const __m256 eight = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
#endif
  return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}

// Sums of one register block, stored as [pixel][output]; tap rows [tap_begin, tap_end) are read.
template <int kOutputs>
static inline void sum_block(const Source* sources, int count, int stride, int taps, int tap_begin, int tap_end,
                             const float* w, float* sums) {
  constexpr int kCount = kPixels<kOutputs>, kSums = kCount * kOutputs;
  Vec acc[kCount][kOutputs];
  FASTSR_UNROLL for (int i = 0; i < kCount; ++i) {
    FASTSR_UNROLL for (int o = 0; o < kOutputs; ++o) acc[i][o] = zero();
  }
  for (int tap = tap_begin; tap < tap_end; ++tap) {
    for (int k = 0; k < count; ++k) {
      const Source& s = sources[k];
      if (s.type == kFloat) {
        add_row<kOutputs>(reinterpret_cast<const float*>(s.at) + tap * s.row, s.pixel, stride, s.width, taps, w, acc);
      } else {
        add_row<kOutputs>(reinterpret_cast<const bf16*>(s.at) + tap * s.row, s.pixel, stride, s.width, taps, w, acc);
      }
    }
  }
  FASTSR_UNROLL for (int i = 0; i < kSums; i += 4) {
    Vec v[4];
    FASTSR_UNROLL for (int k = 0; k < 4; ++k) {
      v[k] = i + k < kSums ? acc[(i + k) % kSums / kOutputs][(i + k) % kOutputs] : zero();
    }
    _mm_storeu_ps(sums + i, sum4(v[0], v[1], v[2], v[3]));
  }
}

// Brings `count` pixels of a row of all sources near.
FASTSR_INLINE void prefetch_row(const Source* sources, int count, std::int64_t row, int pixels) {
  for (int k = 0; k < count; ++k) {
    const Source& s = sources[k];
    const std::int64_t size = width_of(s.type);
    const char* at = reinterpret_cast<const char*>(s.at + row * s.row * size);
    for (int i = 0; i < pixels; ++i, at += s.pixel * size) {
      for (std::int64_t b = 0; b < s.width * size; b += 64) _mm_prefetch(at + b, _MM_HINT_T0);
    }
  }
}

template <int kOutputs>
static inline void run_tile(const Conv& c, const Plan& plan, std::int64_t task, void* scratch) {
  constexpr int kCount = kPixels<kOutputs>;
  const Shape& s = c.shape;
  const direct::Geometry g = geometry(s);
  const Outputs out = outputs_of(s, g.phases);
  const direct::Packed p = direct::unpack(s, out, reinterpret_cast<void*>(c.packed.data));
  char* memory = static_cast<char*>(scratch);
  float* sums = reinterpret_cast<float*>(memory);
  Sink* sinks = reinterpret_cast<Sink*>(memory + plan.own[kSinksAt]);
  direct::Plane* planes = reinterpret_cast<direct::Plane*>(memory + plan.own[kPlanesAt]);
  int channels = 0, begin = 0;
  for (int i = 0; i < s.sources; ++i) {  // the copy has each source by itself, in whole vectors
    const int width = static_cast<int>(round_up(s.widths[i], kLanes));
    planes[i] = {{begin, begin + s.widths[i]}, width, channels, 0, 1};
    begin += s.widths[i];
    channels += width;
  }

  const std::int64_t tile_x = task % plan.own[kTilesX], tile_y = task / plan.own[kTilesX] % plan.own[kTilesY];
  const std::int64_t n = task / plan.own[kTilesX] / plan.own[kTilesY];
  const std::int64_t y0 = tile_y * plan.own[kRows], x0 = tile_x * kTileColumns;
  const std::int64_t rows = min_of(plan.own[kRows], ceil_div(c.out_height, g.phases) - y0);
  const std::int64_t columns = min_of(kTileColumns, ceil_div(c.out_width, g.phases) - x0);
  const int sink_end = make_sinks(c, out, n, g.phases, 0, 0, p.bias, p.slope, sinks);

  direct::Copy<float> copy = {
      n,      c.height, c.width, 0, 0, 0, 0, 0, 0, 0, reinterpret_cast<float*>(memory + plan.own[kCopyAt]),
      planes, s.sources};
  auto start_copy = [&](std::int64_t y, std::int64_t x, std::int64_t count_y, std::int64_t count_x) {
    copy.y = y * g.stride + g.low;
    copy.x = x * g.stride + g.low;
    copy.rows = direct::copied_rows(g, count_y);
    copy.columns = direct::copied_columns(g, count_x);
    copy.needed = copy.columns - g.spare * g.stride;
    copy.made = 0;
    copy.row = copy.columns * channels;
  };
  if (copied(s)) start_copy(y0, x0, rows, columns);

  Source sources[kMaxSources];
  for (std::int64_t y = y0; y < y0 + rows; ++y) {
    float* partial = nullptr;
    if (c.partial.data != 0) {
      partial = reinterpret_cast<float*>(c.partial.data) + n * c.partial.image +
                (y * plan.own[kTilesX] + tile_x) * c.partial.row;
      std::memset(partial, 0, round_up(s.cout, kBlock) * 4);
    }
    const std::int64_t top = y * g.stride + g.low;  // the input row of the first tap
    for (std::int64_t x = x0; x < x0 + columns; x += kCount) {
      const std::int64_t left = x * g.stride + g.low;
      const bool inside = left >= 0 && left + (kCount - 1) * g.stride + taps(g) <= c.width;
      int tap_begin = 0, tap_end = taps(g);
      if (inside && !copied(s)) {
        tap_begin = static_cast<int>(min_of(tap_end, max_of(0, -top)));
        tap_end = static_cast<int>(max_of(tap_begin, min_of(tap_end, c.height - top)));
        for (int i = 0; i < s.sources; ++i) {
          const Map& m = c.in[i];
          sources[i] = {m.data + (n * m.image + top * m.row + left * m.pixel) * width_of(m.type), m.row, m.pixel,
                        m.type, s.widths[i]};
        }
        // The next row of the grid reads as many new rows of the inputs as the stride.
        if (y + 1 < y0 + rows) prefetch_row(sources, s.sources, taps(g), kCount * g.stride);
      } else {
        if (!copied(s)) start_copy(y, x, 1, min_of(kCount, x0 + columns - x));
        while (copy.made < min_of(copy.rows, top + taps(g) - copy.y)) direct::make_row(c, g, p, copy);
        for (int i = 0; i < s.sources; ++i) {
          const direct::Plane& plane = planes[i];
          const float* at =
              copy.data + (top - copy.y) * copy.row + copy.columns * plane.begin + (left - copy.x) * plane.width;
          sources[i] = {reinterpret_cast<std::int64_t>(at), copy.row, plane.width, kFloat, plane.width};
        }
      }
      const float* w = static_cast<const float*>(p.weights) + tap_begin * taps(g) * vectors(s) * kOutputs * kLanes;
      sum_block<kOutputs>(sources, s.sources, g.stride, taps(g), tap_begin, tap_end, w, sums + (x - x0) * kOutputs);
    }
    for (int i = 0; i < sink_end; ++i) {
      if (partial != nullptr) {
        finish_pixels<true>(sinks[i], sums, kOutputs, static_cast<int>(columns), y, x0, partial);
      } else {
        finish_pixels<false>(sinks[i], sums, kOutputs, static_cast<int>(columns), y, x0, nullptr);
      }
    }
  }
  end_stream();
}

static inline void run(const Conv& c, const Plan& plan, std::int64_t task, void* scratch) {
  switch (c.shape.cout * geometry(c.shape).phases * geometry(c.shape).phases) {
    case 1:
      return run_tile<1>(c, plan, task, scratch);
    case 2:
      return run_tile<2>(c, plan, task, scratch);
    case 3:
      return run_tile<3>(c, plan, task, scratch);
    default:
      return run_tile<4>(c, plan, task, scratch);
  }
}

}  // namespace few_outputs

constexpr Algorithm kNarrowAlgorithm = {few_outputs::refuse, few_outputs::packed_bytes, few_outputs::pack,
                                        few_outputs::plan, few_outputs::run};

}  // namespace
}  // namespace fastsr::cpu
