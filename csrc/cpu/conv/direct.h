// Convolution of any kernel, stride and direction over a zero-padded copy of a tile of the input.
//
// Every case becomes one: a grid of output pixels for each of one or more phases, where pixel q of a phase reads a run
// of inputs from q * stride + offset on.
//   plain        one phase; a run of k inputs.
//   transposed   stride^2 phases: the outputs q * stride + phase, each of which reads only every stride-th tap.
//   upsample     with stride 1, upsample^2 phases whose taps are sums of those that fall on one input; else the copy
//                repeats pixels.
// Phases are computed one after the other, or, where they have so few outputs that lanes would stay empty, as outputs
// side by side.
//
// A task is a tile of the grid of one image. It copies the inputs that the tile reads, with zeros around the image, the
// prologue applied, all sources side by side and in the type of the products. Neighbouring taps of a row are then
// contiguous, so that even one input channel makes long runs; for groups, the copy is made by the ranges of channels
// that are read together. Sums over many inputs are added up in pieces, which is more accurate and lets the weights of
// a piece stay in the cache.
#pragma once

#include "cpu/conv/blocks.h"
#include "cpu/conv/products.h"

namespace fastsr::cpu {
namespace {
namespace direct {

constexpr std::int64_t kTileBytes = 384 << 10;  // of copied inputs; unfinished sums may take as many
constexpr int kPiece = 640;                     // inputs that are summed before they are added to the rest
constexpr int kStrip = 24;  // pixels that are finished together, a multiple of every register block's

struct Geometry {
  int phases;     // an axis, all of them
  bool merged;    // phases are outputs of one grid
  int stride;     // of the inputs that neighbouring pixels of the grid read
  int repeat;     // the copy repeats each input so often
  int low, high;  // offsets of the first and the last input that pixel 0 reads in any phase
  int spare;      // pixels that a register block may compute behind a row's last
};

// One phase along one axis: `taps` inputs from q * stride + offset on.
struct Axis {
  int offset, taps;
};

FASTSR_INLINE bool phased_upsample(const Shape& s) {
  return s.upsample > 1 && s.stride == 1 && !s.transposed;
}

FASTSR_INLINE Axis phase_axis(const Shape& s, int phase) {
  std::int64_t low = -s.padding, high = s.kernel - 1 - s.padding;
  if (s.transposed) {  // output q * stride + phase gets input q + d through tap phase + padding - d * stride
    low = -floor_div(s.kernel - 1 - phase - s.padding, s.stride);
    high = floor_div(phase + s.padding, s.stride);
  } else if (phased_upsample(s)) {
    low = floor_div(phase - s.padding, s.upsample);
    high = floor_div(phase - s.padding + s.kernel - 1, s.upsample);
  }
  return {static_cast<int>(low), static_cast<int>(high < low ? 0 : high - low + 1)};
}

// The kernel's taps that read the input at an offset, along one axis.
FASTSR_INLINE Range kernel_taps(const Shape& s, int phase, int offset) {
  int begin = offset + s.padding, end = begin + 1;
  if (s.transposed) {
    begin = phase + s.padding - offset * s.stride;
    end = begin + 1;
  } else if (phased_upsample(s)) {
    begin = offset * s.upsample - phase + s.padding;
    end = begin + s.upsample;
  }
  return {begin < 0 ? 0 : begin, end > s.kernel ? s.kernel : end};
}

static inline Geometry geometry(const Shape& s) {
  Geometry g;
  g.phases = s.transposed ? s.stride : phased_upsample(s) ? s.upsample : 1;
  g.stride = s.transposed ? 1 : s.stride;
  g.repeat = phased_upsample(s) ? 1 : s.upsample;
  g.low = 1 << 20;
  g.high = -(1 << 20);
  int taps = 0;  // of all phases
  for (int phase = 0; phase < g.phases; ++phase) {
    const Axis a = phase_axis(s, phase);
    if (a.taps == 0) continue;
    taps += a.taps;
    g.low = a.offset < g.low ? a.offset : g.low;
    g.high = a.offset + a.taps - 1 > g.high ? a.offset + a.taps - 1 : g.high;
  }
  if (taps == 0) g.low = g.high = 0;
  // Merged phases all read the union of their inputs.
  const std::int64_t all = g.high - g.low + 1, together = ceil_div(s.cout * g.phases * g.phases, kBlock) * all * all;
  g.merged = g.phases > 1 && together < ceil_div(s.cout, kBlock) * taps * taps;
  const Outputs out = outputs_of(s, g.merged ? g.phases : 1);
  g.spare = (s.groups > 1 ? kMostPixels<1> : most_pixels(panel_at(0, 0, out.blocks).blocks)) - 1;
  return g;
}

FASTSR_INLINE Outputs outputs(const Shape& s, const Geometry& g) {
  return outputs_of(s, g.merged ? g.phases : 1);
}

FASTSR_INLINE Axis axis(const Shape& s, const Geometry& g, int phase) {
  return g.merged ? Axis{g.low, g.high - g.low + 1} : phase_axis(s, phase);
}

// Phases that are computed apart, an axis.
FASTSR_INLINE int passes(const Geometry& g) {
  return g.merged ? 1 : g.phases;
}

// Channels that some blocks read, side by side in the copy: in each of its rows, planes come one after the other.
struct Plane {
  Range inputs;
  int width;  // bfloat16 is multiplied in pairs, so odd widths get a zero
  int begin;  // the widths of the planes before
  int first_block, end_block;
};

// Calls do_plane(plane) for all planes and returns their widths together.
template <typename F>
FASTSR_INLINE int for_planes(const Shape& s, const Outputs& out, F do_plane) {
  Plane p = {};
  for (int block = 0; block < out.blocks; block = p.end_block) {
    p.inputs = block_inputs(s, out, block);
    p.first_block = block;
    p.end_block = same_inputs(s, out, block);
    p.begin += p.width;
    p.width = p.inputs.end - p.inputs.begin;
    if (s.bf16_products) p.width += p.width % 2;
    do_plane(p);
  }
  return p.begin + p.width;
}

static inline const char* refuse(const Shape& s) {
  if (s.kernel < 1 || s.kernel > 64) return "kernel is outside 1..64";
  if (s.stride < 1 || s.stride > 64) return "stride is outside 1..64";
  if (s.upsample < 1 || s.upsample > 16) return "upsample is outside 1..16";
  if (s.padding < 0 || s.padding > 1024) return "padding is outside 0..1024";
#if !defined(__AVX512BF16__)
  if (s.bf16_products) return "products of bfloat16 need AVX-512 BF16";
#endif
  return nullptr;
}

// Packed: bias, slopes, then the prologue's scale and shift (all with zeros behind the last), then weights in the order
// of phases (y, x), planes and panels: [tap y][tap x][input][output], in bfloat16 [tap y][tap x][input / 2][output][2].
struct Packed {
  float *bias, *slope, *pre_scale, *pre_shift;
  void* weights;
};

FASTSR_INLINE std::int64_t packed_inputs(const Shape& s) {
  return round_up(s.cin, kBlock) + kBlock;
}

FASTSR_INLINE Packed unpack(const Shape& s, const Outputs& out, void* packed) {
  Packed p;
  const std::int64_t inputs = packed_inputs(s);
  p.bias = static_cast<float*>(packed);
  p.slope = p.bias + out.blocks * kBlock;
  p.pre_scale = p.slope + out.blocks * kBlock;
  p.pre_shift = p.pre_scale + inputs;
  p.weights = p.pre_shift + inputs;
  return p;
}

FASTSR_INLINE std::int64_t weight_count(const Plane& plane, int blocks, const Axis& y, const Axis& x) {
  return static_cast<std::int64_t>(y.taps) * x.taps * plane.width * blocks * kLanes;
}

static inline std::int64_t packed_bytes(const Shape& s) {
  const Geometry g = geometry(s);
  const Outputs out = outputs(s, g);
  std::int64_t count = 0;
  for_planes(s, out, [&](const Plane& plane) {
    for (int py = 0; py < passes(g); ++py) {
      for (int px = 0; px < passes(g); ++px) {
        count += weight_count(plane, plane.end_block - plane.first_block, axis(s, g, py), axis(s, g, px));
      }
    }
  });
  return 4 * 2 * (out.blocks * kBlock + packed_inputs(s)) + count * (s.bf16_products ? 2 : 4);
}

// The sum of a kernel's taps that read the input at offsets (y, x) for an output of a phase.
static inline double tap(const Shape& s, const float* weight, int o, int i, int phase_y, int phase_x, int y, int x) {
  const Range rows = kernel_taps(s, phase_y, y), columns = kernel_taps(s, phase_x, x);
  double sum = 0.0;
  for (int ky = rows.begin; ky < rows.end; ++ky) {
    for (int kx = columns.begin; kx < columns.end; ++kx) sum += weight_at(s, weight, o, i, ky, kx);
  }
  return sum;
}

static inline void pack_vectors(const Shape& s, const Outputs& out, const float* bias, const float* slope,
                                const float* pre_scale, const float* pre_shift, const Packed& p) {
  pack_outputs(s, out, bias, p.bias);
  pack_outputs(s, out, slope, p.slope);
  for (int i = 0; i < packed_inputs(s); ++i) {
    p.pre_scale[i] = i >= s.cin ? 0.0f : pre_scale != nullptr ? pre_scale[i] : 1.0f;
    p.pre_shift[i] = i < s.cin && pre_shift != nullptr ? pre_shift[i] : 0.0f;
  }
}

static inline void pack(const Shape& s, const float* weight, const float* bias, const float* slope,
                        const float* pre_scale, const float* pre_shift, void* packed) {
  const Geometry g = geometry(s);
  const Outputs out = outputs(s, g);
  const Packed p = unpack(s, out, packed);
  pack_vectors(s, out, bias, slope, pre_scale, pre_shift, p);
  float* floats = static_cast<float*>(p.weights);
  bf16* halves = static_cast<bf16*>(p.weights);
  for (int pass = 0; pass < passes(g) * passes(g); ++pass) {
    const int py = pass / passes(g), px = pass % passes(g);
    const Axis y = axis(s, g, py), x = axis(s, g, px);
    for_planes(s, out, [&](const Plane& plane) {
      for (int block = plane.first_block; block < plane.end_block;) {
        const Panel panel = panel_at(block, plane.first_block, plane.end_block);
        const int lanes = panel.blocks * kLanes;
        for (std::int64_t k = 0; k < static_cast<std::int64_t>(y.taps) * x.taps * plane.width; ++k) {
          const int i = plane.inputs.begin + static_cast<int>(k % plane.width);
          const int tap_y = static_cast<int>(k / plane.width / x.taps);
          const int tap_x = static_cast<int>(k / plane.width % x.taps);
          for (int lane = 0; lane < lanes; ++lane) {
            const int position = block * kBlock + lane, phase = g.merged ? position / s.cout : 0;
            const bool inside = position < out.count && i < plane.inputs.end;
            const double w = inside ? tap(s, weight, output_at(s, position), i, py + phase / g.phases,
                                          px + phase % g.phases, y.offset + tap_y, x.offset + tap_x)
                                    : 0.0;
            if (s.bf16_products) {
              halves[(k / 2 * lanes + lane) * 2 + k % 2] = to_bf16(static_cast<float>(w));
            } else {
              floats[k * lanes + lane] = static_cast<float>(w);
            }
          }
        }
        floats += weight_count(plane, panel.blocks, y, x);
        halves += weight_count(plane, panel.blocks, y, x);
        block += panel.blocks;
      }
    });
  }
}

// Plan::own: rows and columns of the grid in a tile, tiles along y and x, and where in the scratch the unfinished sums,
// the sinks and the planes begin.
enum Own { kTileRows, kTileColumns, kTilesY, kTilesX, kSumsAt, kSinksAt, kPlanesAt };

// Columns of the copy for so many of the grid. A register block may compute pixels behind a row's last, whose inputs
// must exist but need no value.
FASTSR_INLINE std::int64_t copied_columns(const Geometry& g, std::int64_t columns) {
  return (columns + g.spare - 1) * g.stride + g.high - g.low + 1;
}
FASTSR_INLINE std::int64_t copied_rows(const Geometry& g, std::int64_t rows) {
  return (rows - 1) * g.stride + g.high - g.low + 1;
}

static inline Plan plan(const Conv& c, int threads) {
  const Shape& s = c.shape;
  const Geometry g = geometry(s);
  const Outputs out = outputs(s, g);
  const std::int64_t grid_y = ceil_div(c.out_height, g.phases), grid_x = ceil_div(c.out_width, g.phases);
  const std::int64_t pixel = for_planes(s, out, [](const Plane&) {}) * (s.bf16_products ? 2 : 4);
  auto copied = [&](std::int64_t rows, std::int64_t columns) {
    return copied_rows(g, rows) * copied_columns(g, columns) * pixel;
  };
  auto unfinished = [&](std::int64_t rows, std::int64_t columns) {
    return rows * (columns + kStrip) * kPanelBlocks * kLanes * 4;
  };
  // The tile that copies least for what it computes. Its width must not depend on the number of threads: partial sums
  // are made over one row of a tile.
  std::int64_t rows = 1, columns = min_of(grid_x, 12);
  double least = 1e30;
  for (std::int64_t tiles = 1; tiles <= ceil_div(grid_x, 12); ++tiles) {
    const std::int64_t w = min_of(grid_x, round_up(ceil_div(grid_x, tiles), 12));
    const std::int64_t fit = (kTileBytes / (copied_columns(g, w) * pixel) - (g.high - g.low + 1)) / g.stride + 1;
    const std::int64_t h = min_of(min_of(fit, grid_y), kTileBytes / unfinished(1, w));
    if (h < 1) continue;
    const double cost = static_cast<double>(copied(h, w)) / static_cast<double>(h * w);
    if (cost < 0.97 * least) {  // wider tiles are better otherwise
      least = cost;
      rows = h;
      columns = w;
    }
  }
  const std::int64_t tiles_x = ceil_div(grid_x, columns);
  const std::int64_t wanted = ceil_div(4 * threads, c.n * tiles_x);  // tiles along y that give every thread four
  rows = max_of(1, min_of(rows, grid_y / wanted));
  rows = ceil_div(grid_y, ceil_div(grid_y, rows));

  Plan p = {};
  p.own[kTileRows] = rows;
  p.own[kTileColumns] = columns;
  p.own[kTilesY] = ceil_div(grid_y, rows);
  p.own[kTilesX] = tiles_x;
  p.own[kSumsAt] = round_up(copied(rows, columns), 64);
  p.own[kSinksAt] = p.own[kSumsAt] + round_up(unfinished(rows, columns), 64);
  p.own[kPlanesAt] = p.own[kSinksAt] + sink_count(out) * static_cast<std::int64_t>(sizeof(Sink));
  p.tasks = c.n * p.own[kTilesY] * p.own[kTilesX];
  p.scratch = p.own[kPlanesAt] + out.blocks * static_cast<std::int64_t>(sizeof(Plane));
  p.partials = grid_y * tiles_x;
  return p;
}

// The copy of a tile's inputs. Its rows are made when they are first read.
template <typename T>
struct Copy {
  std::int64_t n, height, width;       // the (repeated) image
  std::int64_t y, x;                   // where it begins there; it may reach over the edges
  std::int64_t rows, columns, needed;  // `needed` of the columns have values
  std::int64_t made;                   // rows so far
  std::int64_t row;                    // elements
  T* data;
  const Plane* planes;
  int plane_count;
};

template <typename To, typename From>
FASTSR_INLINE void convert(const From* from, To* to, std::int64_t count) {
  if constexpr (sizeof(To) == sizeof(From)) {
    std::memcpy(to, from, count * sizeof(To));
  } else {
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
    const Mask rest = first(static_cast<int>(count - i));
    if (i < count) store(to + i, load(from + i, rest), rest);
  }
}

// `width` channels of `count` pixels of one row, the first of them pixel x of the repeated image.
template <bool kPre, typename From, typename To>
static inline void copy_pixels(const Shape& s, const Geometry& g, const Map& map, const From* from, std::int64_t x,
                               std::int64_t count, int width, const float* scale, const float* shift, To* to,
                               int step) {
  if (!kPre && g.repeat == 1 && map.pixel == width && step == width) {
    return convert(from + x * map.pixel, to, count * width);
  }
  from += x / g.repeat * map.pixel;
  std::int64_t repeated = x % g.repeat;
  const int whole = width / kLanes * kLanes;
  const Mask rest = first(width - whole);
  auto prologue = [&](Vec v, int i) {
    if (!kPre) return v;
    if (s.has_pre) v = fma(v, load(scale + i), load(shift + i));
    return s.pre_relu ? positive(v) : v;
  };
  for (; count > 0; --count, to += step) {
    int i = 0;
    for (; i < whole; i += kLanes) store(to + i, prologue(load(from + i), i));
    if (whole < width) store(to + i, prologue(load(from + i, rest), i), rest);
    if (++repeated == g.repeat) {
      repeated = 0;
      from += map.pixel;
    }
  }
}

template <typename From, typename To>
FASTSR_INLINE void copy_source(const Conv& c, const Geometry& g, const Map& map, std::int64_t n, std::int64_t y,
                               std::int64_t x, std::int64_t count, Range channels, const float* scale,
                               const float* shift, To* to, int step) {
  const From* from = reinterpret_cast<const From*>(map.data) + n * map.image + y / g.repeat * map.row + channels.begin;
  const int width = channels.end - channels.begin;
  if (c.shape.has_pre || c.shape.pre_relu) {
    copy_pixels<true>(c.shape, g, map, from, x, count, width, scale, shift, to, step);
  } else {
    copy_pixels<false>(c.shape, g, map, from, x, count, width, scale, shift, to, step);
  }
}

// Makes the next row of the copy.
template <typename T>
static inline void make_row(const Conv& c, const Geometry& g, const Packed& p, Copy<T>& copy) {
  const Shape& s = c.shape;
  T* to = copy.data + copy.made * copy.row;
  const std::int64_t y = copy.y + copy.made++;
  if (y < 0 || y >= copy.height) {
    std::memset(to, 0, copy.row * sizeof(T));
    return;
  }
  const std::int64_t first = min_of(max_of(0, -copy.x), copy.needed);                // columns before the image
  const std::int64_t end = max_of(first, min_of(copy.needed, copy.width - copy.x));  // the first behind it
  for (int k = 0; k < copy.plane_count; ++k) {
    const Plane& plane = copy.planes[k];
    T* start = to + copy.columns * plane.begin;
    T* inside = start + first * plane.width;
    std::memset(start, 0, first * plane.width * sizeof(T));
    std::memset(start + end * plane.width, 0, (copy.columns - end) * plane.width * sizeof(T));
    const int channels = plane.inputs.end - plane.inputs.begin;
    for (std::int64_t i = 0; channels < plane.width && i < end - first; ++i) {
      std::memset(inside + i * plane.width + channels, 0, (plane.width - channels) * sizeof(T));
    }
    int begin = 0;  // of the source among all channels
    for (int i = 0; i < s.sources; ++i) {
      const Map& map = c.in[i];
      const int from = static_cast<int>(max_of(plane.inputs.begin, begin));
      const int until = static_cast<int>(min_of(plane.inputs.end, begin + map.channels));
      if (from < until) {
        const Range range = {from - begin, until - begin};
        T* at = inside + (from - plane.inputs.begin);
        if (map.type == kFloat) {
          copy_source<float>(c, g, map, copy.n, y, copy.x + first, end - first, range, p.pre_scale + from,
                             p.pre_shift + from, at, plane.width);
        } else {
          copy_source<bf16>(c, g, map, copy.n, y, copy.x + first, end - first, range, p.pre_scale + from,
                            p.pre_shift + from, at, plane.width);
        }
      }
      begin += map.channels;
    }
  }
}

// What a panel of a phase needs to know.
template <typename T>
struct Job {
  const Conv& c;
  const Geometry& g;
  const Packed& p;
  Copy<T>& copy;
  std::int64_t y, x, rows, columns;  // of the grid
  Axis tap_y, tap_x;
  const Plane& plane;
  Panel panel;
  const Sink* sinks;
  int sink_begin, sink_end;
  const T* weights;
  float* sums;
  float* partial;  // that of the tile's first row, or null
  std::int64_t partial_row;
};

template <int kBlocks, typename T>
static inline void run_panel(const Job<T>& job) {
  constexpr int kMost = kMostPixels<kBlocks>;
  const Geometry& g = job.g;
  Copy<T>& copy = job.copy;
  const int width = job.plane.width;
  const T* corner = copy.data + (job.tap_y.offset - g.low) * copy.row + copy.columns * job.plane.begin +
                    static_cast<std::int64_t>(job.tap_x.offset - g.low) * width;
  const std::int64_t length = static_cast<std::int64_t>(job.tap_x.taps) * width;
  const int taps_y = job.tap_x.taps > 0 ? job.tap_y.taps : 0;
  const std::int64_t sums_row = (job.columns + kStrip) * kBlocks * kLanes;
  // A piece is several rows of taps, or a part of one.
  const int rows_a_piece = length > 0 ? static_cast<int>(max_of(1, min_of(taps_y, kPiece / length))) : 1;
  const std::int64_t part = length > kPiece ? round_up(ceil_div(length, ceil_div(length, kPiece)), 2) : length;
  Walk walk = {static_cast<std::int64_t>(g.stride) * width, copy.row, 0, 0};
  int tap = 0;             // the piece's first row
  std::int64_t begin = 0;  // and its first input in there
  for (bool first = true, last = false; !last; first = false) {
    const T* a = corner + tap * copy.row + begin;
    const T* w = job.weights + (tap * length + begin) * kBlocks * kLanes;
    walk.rows = static_cast<int>(min_of(rows_a_piece, taps_y - tap));
    walk.length = static_cast<int>(min_of(part, length - begin));
    begin += part;
    if (begin >= length) {
      begin = 0;
      tap += walk.rows;
      last = tap >= taps_y;
    }
    for (std::int64_t y = 0; y < job.rows; ++y) {
      while (copy.made < min_of(copy.rows, copied_rows(g, y + 1))) make_row(job.c, g, job.p, copy);
      for (std::int64_t strip = 0; strip < job.columns; strip += kStrip) {
        const std::int64_t end = min_of(strip + kStrip, job.columns);
        float* sums = first && last ? job.sums : job.sums + y * sums_row + strip * kBlocks * kLanes;
        for (std::int64_t x = strip; x < end; x += kMost) {
          sum_pixels<kBlocks>(static_cast<int>(min_of(kMost, end - x)), a + y * g.stride * copy.row + x * walk.pixel,
                              walk, w, first, sums + (x - strip) * kBlocks * kLanes);
        }
        if (last) {
          finish_panel(job.sinks, job.sink_begin, job.sink_end, job.panel, sums, static_cast<int>(end - strip),
                       job.y + y, job.x + strip, job.partial == nullptr ? nullptr : job.partial + y * job.partial_row);
        }
      }
    }
  }
}

template <typename T>
static inline void run_tile(const Conv& c, const Plan& plan, std::int64_t task, void* scratch) {
  const Shape& s = c.shape;
  const Geometry g = geometry(s);
  const Outputs out = outputs(s, g);
  const Packed p = unpack(s, out, reinterpret_cast<void*>(c.packed.data));
  char* memory = static_cast<char*>(scratch);
  Sink* sinks = reinterpret_cast<Sink*>(memory + plan.own[kSinksAt]);
  Plane* planes = reinterpret_cast<Plane*>(memory + plan.own[kPlanesAt]);
  int plane_count = 0;
  const int channels = for_planes(s, out, [&](const Plane& plane) { planes[plane_count++] = plane; });

  const std::int64_t tile_x = task % plan.own[kTilesX], tile_y = task / plan.own[kTilesX] % plan.own[kTilesY];
  const std::int64_t n = task / plan.own[kTilesX] / plan.own[kTilesY];
  const std::int64_t y = tile_y * plan.own[kTileRows], x = tile_x * plan.own[kTileColumns];
  const std::int64_t rows = min_of(plan.own[kTileRows], ceil_div(c.out_height, g.phases) - y);
  const std::int64_t columns = min_of(plan.own[kTileColumns], ceil_div(c.out_width, g.phases) - x);
  Copy<T> copy = {n,
                  c.height * g.repeat,
                  c.width * g.repeat,
                  y * g.stride + g.low,
                  x * g.stride + g.low,
                  copied_rows(g, rows),
                  copied_columns(g, columns),
                  copied_columns(g, columns) - g.spare * g.stride,
                  0,
                  copied_columns(g, columns) * channels,
                  reinterpret_cast<T*>(memory),
                  planes,
                  plane_count};

  float* partial = nullptr;
  const std::int64_t partial_row = plan.own[kTilesX] * c.partial.row;
  if (c.partial.data != 0) {
    partial = reinterpret_cast<float*>(c.partial.data) + n * c.partial.image + y * partial_row + tile_x * c.partial.row;
    for (std::int64_t i = 0; i < rows; ++i) std::memset(partial + i * partial_row, 0, round_up(s.cout, kBlock) * 4);
  }

  const T* weights = static_cast<const T*>(p.weights);
  for (int pass = 0; pass < passes(g) * passes(g); ++pass) {
    const int py = pass / passes(g), px = pass % passes(g);
    const Axis tap_y = axis(s, g, py), tap_x = axis(s, g, px);
    const int sink_end = make_sinks(c, out, n, g.phases, py, px, p.bias, p.slope, sinks);
    int sink = 0;
    for (int k = 0; k < plane_count; ++k) {
      for (int block = planes[k].first_block; block < planes[k].end_block;) {
        const Panel panel = panel_at(block, planes[k].first_block, planes[k].end_block);
        Job<T> job = {c,
                      g,
                      p,
                      copy,
                      y,
                      x,
                      rows,
                      columns,
                      tap_y,
                      tap_x,
                      planes[k],
                      panel,
                      sinks,
                      sink,
                      sink,
                      weights,
                      reinterpret_cast<float*>(memory + plan.own[kSumsAt]),
                      partial,
                      partial_row};
        while (job.sink_end < sink_end && sinks[job.sink_end].block < block + panel.blocks) ++job.sink_end;
        switch (panel.blocks) {
#if defined(__AVX512F__)
          case 4:
            run_panel<4>(job);
            break;
          case 3:
            run_panel<3>(job);
            break;
          case 2:
            run_panel<2>(job);
            break;
#endif
          default:
            run_panel<1>(job);
        }
        sink = job.sink_end;
        weights += weight_count(planes[k], panel.blocks, tap_y, tap_x);
        block += panel.blocks;
      }
    }
  }
  end_stream();
}

static inline void run(const Conv& c, const Plan& plan, std::int64_t task, void* scratch) {
#if defined(__AVX512BF16__)
  if (c.shape.bf16_products) return run_tile<bf16>(c, plan, task, scratch);
#endif
  run_tile<float>(c, plan, task, scratch);
}

}  // namespace direct

constexpr Algorithm kDirectAlgorithm = {direct::refuse, direct::packed_bytes, direct::pack, direct::plan, direct::run};

}  // namespace
}  // namespace fastsr::cpu
