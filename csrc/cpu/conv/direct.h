// Convolution of any kernel, stride and direction over a zero-padded copy of a tile of the input.
//
// Every case becomes one: a grid of output pixels for each of one or more phases, where pixel q of a phase reads a run
// of inputs from q * stride + offset on.
//   plain        one phase; a run of k inputs.
//   transposed   stride^2 phases: the outputs q * stride + phase, each of which reads only every stride-th tap.
//   upsample     with stride 1, upsample^2 phases whose taps are sums of those that fall on one input; else the copy
//                repeats pixels.
// A task is a tile of the grid of one image. It copies the inputs that the tile reads, with zeros around the image, the
// prologue applied, all sources side by side and in the type of the products; neighbouring taps of a row are then
// contiguous, so that even one input channel makes long runs. Sums over many inputs are added up in pieces, which is
// more accurate and lets the weights of a piece stay in the cache.
#pragma once

#include "cpu/conv/blocks.h"
#include "cpu/conv/products.h"

namespace fastsr::cpu {
namespace {
namespace direct {

constexpr std::int64_t kTileBytes = 256 << 10;  // of copied inputs, and of unfinished sums
constexpr int kPiece = 1024;                    // inputs that are summed before they are added to the rest

// One phase along one axis: `taps` inputs from q * stride + offset on.
struct Axis {
  int offset, taps;
};

struct Geometry {
  int phases;  // an axis
  int stride;  // of the inputs that neighbouring pixels of the grid read
  int repeat;  // the copy repeats each input so often
  int channels;  // of the copy: bfloat16 is multiplied in pairs
  int low, high;  // offsets of the first and the last input that pixel 0 reads in any phase
};

FASTSR_INLINE Axis axis(const Shape& s, int phase) {
  if (s.transposed) {
    // Output q * stride + phase gets input q + d through tap phase + padding - d * stride.
    const int low = static_cast<int>(-floor_div(s.kernel - 1 - phase - s.padding, s.stride));
    const int high = static_cast<int>(floor_div(phase + s.padding, s.stride));
    return {low, high - low + 1};
  }
  if (s.upsample > 1 && s.stride == 1) {
    const int low = static_cast<int>(floor_div(phase - s.padding, s.upsample));
    const int high = static_cast<int>(floor_div(phase - s.padding + s.kernel - 1, s.upsample));
    return {low, high - low + 1};
  }
  return {-s.padding, s.kernel};
}

// Whether kernel tap t along one axis reads input `offset + tap` in this phase.
FASTSR_INLINE bool meets(const Shape& s, int phase, int input, int t) {
  if (s.transposed) return t == phase + s.padding - input * s.stride;
  if (s.upsample > 1 && s.stride == 1) return floor_div(phase - s.padding + t, s.upsample) == input;
  return t - s.padding == input;
}

static inline Geometry geometry(const Shape& s) {
  Geometry g;
  const bool phased_upsample = !s.transposed && s.upsample > 1 && s.stride == 1;
  g.phases = s.transposed ? s.stride : phased_upsample ? s.upsample : 1;
  g.stride = s.transposed ? 1 : s.stride;
  g.repeat = phased_upsample ? 1 : s.upsample;
  g.channels = s.bf16_products ? (s.cin + 1) / 2 * 2 : s.cin;
  g.low = 0;
  g.high = 0;
  for (int phase = 0; phase < g.phases; ++phase) {
    const Axis a = axis(s, phase);
    if (a.taps <= 0) continue;
    g.low = a.offset < g.low ? a.offset : g.low;
    g.high = a.offset + a.taps - 1 > g.high ? a.offset + a.taps - 1 : g.high;
  }
  return g;
}

// Inputs of a panel as the copy has them.
FASTSR_INLINE Range panel_inputs(const Shape& s, const Panel& panel) {
  if (!s.bf16_products) return panel.inputs;
  return {panel.inputs.begin / 2 * 2, (panel.inputs.end + 1) / 2 * 2};
}

// Weights of one panel and phase: [tap y][tap x][input][output], in bfloat16 [input / 2][output][2].
FASTSR_INLINE std::int64_t panel_elements(const Panel& panel, const Range& inputs, const Axis& y, const Axis& x) {
  if (y.taps <= 0 || x.taps <= 0) return 0;
  return static_cast<std::int64_t>(y.taps) * x.taps * (inputs.end - inputs.begin) * panel.blocks * kLanes;
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
// of phases (y, x) and panels.
struct Packed {
  float *bias, *slope, *pre_scale, *pre_shift;
  void* weights;
};

FASTSR_INLINE std::int64_t vector_floats(const Shape& s) {
  return 2 * (block_count(s) * kBlock + round_up(s.cin, kBlock) + kBlock);
}

FASTSR_INLINE Packed unpack(const Shape& s, void* packed) {
  Packed p;
  const std::int64_t outputs = block_count(s) * kBlock, inputs = round_up(s.cin, kBlock) + kBlock;
  p.bias = static_cast<float*>(packed);
  p.slope = p.bias + outputs;
  p.pre_scale = p.slope + outputs;
  p.pre_shift = p.pre_scale + inputs;
  p.weights = p.pre_shift + inputs;
  return p;
}

static inline std::int64_t packed_bytes(const Shape& s) {
  const Geometry g = geometry(s);
  std::int64_t elements = 0;
  for (int block = 0; block < block_count(s);) {
    const Panel panel = panel_at(s, block);
    const Range inputs = panel_inputs(s, panel);
    for (int py = 0; py < g.phases; ++py) {
      for (int px = 0; px < g.phases; ++px) elements += panel_elements(panel, inputs, axis(s, py), axis(s, px));
    }
    block += panel.blocks;
  }
  return vector_floats(s) * 4 + elements * (s.bf16_products ? 2 : 4);
}

static inline void pack(const Shape& s, const float* weight, const float* bias, const float* slope,
                        const float* pre_scale, const float* pre_shift, void* packed) {
  const Geometry g = geometry(s);
  const Packed p = unpack(s, packed);
  pack_outputs(s, bias, p.bias);
  pack_outputs(s, slope, p.slope);
  for (int i = 0; i < round_up(s.cin, kBlock) + kBlock; ++i) {
    p.pre_scale[i] = i >= s.cin ? 0.0f : pre_scale != nullptr ? pre_scale[i] : 1.0f;
    p.pre_shift[i] = i < s.cin && pre_shift != nullptr ? pre_shift[i] : 0.0f;
  }
  float* floats = static_cast<float*>(p.weights);
  bf16* halves = static_cast<bf16*>(p.weights);
  for (int py = 0; py < g.phases; ++py) {
    for (int px = 0; px < g.phases; ++px) {
      const Axis y = axis(s, py), x = axis(s, px);
      for (int block = 0; block < block_count(s);) {
        const Panel panel = panel_at(s, block);
        const Range inputs = panel_inputs(s, panel);
        const int width = panel.blocks * kLanes;
        for (int ty = 0; ty < y.taps; ++ty) {
          for (int tx = 0; tx < x.taps; ++tx) {
            for (int i = inputs.begin; i < inputs.end; ++i) {
              for (int lane = 0; lane < width; ++lane) {
                const int position = block * kBlock + lane;
                double sum = 0.0;
                if (position < s.cout && i < s.cin) {
                  const int o = output_at(s, position);
                  for (int ky = 0; ky < s.kernel; ++ky) {
                    if (!meets(s, py, y.offset + ty, ky)) continue;
                    for (int kx = 0; kx < s.kernel; ++kx) {
                      if (meets(s, px, x.offset + tx, kx)) sum += weight_at(s, weight, o, i, ky, kx);
                    }
                  }
                }
                const std::int64_t row = static_cast<std::int64_t>(ty * x.taps + tx) * (inputs.end - inputs.begin);
                const int at = i - inputs.begin;
                if (s.bf16_products) {
                  halves[((row + at) / 2 * width + lane) * 2 + at % 2] = to_bf16(static_cast<float>(sum));
                } else {
                  floats[(row + at) * width + lane] = static_cast<float>(sum);
                }
              }
            }
          }
        }
        const std::int64_t elements = panel_elements(panel, inputs, y, x);
        floats += elements;
        halves += elements;
        block += panel.blocks;
      }
    }
  }
}

// Plan::own: rows and columns of the grid in a tile, tiles along y and x, and where in the scratch sums and sinks begin.
enum Own { kTileRows, kTileColumns, kTilesY, kTilesX, kSumsAt, kSinksAt };

static inline Plan plan(const Conv& c, int threads) {
  const Shape& s = c.shape;
  const Geometry g = geometry(s);
  const std::int64_t grid_y = ceil_div(c.out_height, g.phases), grid_x = ceil_div(c.out_width, g.phases);
  const std::int64_t pixel = g.channels * (s.bf16_products ? 2 : 4), halo = g.high - g.low;
  const std::int64_t most = 14;  // pixels of a register block; it may read the pixels behind a row's last
  auto copied = [&](std::int64_t rows, std::int64_t columns) {
    return ((rows - 1) * g.stride + halo + 1) * ((columns + most) * g.stride + halo + 1) * pixel;
  };
  auto unfinished = [&](std::int64_t rows, std::int64_t columns) {
    return rows * (columns + most) * kPanelBlocks * kLanes * 4;
  };
  auto fits = [&](std::int64_t rows, std::int64_t columns) {
    return copied(rows, columns) <= kTileBytes && unfinished(rows, columns) <= kTileBytes;
  };
  // The width of a tile must not depend on the number of threads: partial sums are made over one row of a tile.
  const std::int64_t some_rows = min_of(grid_y, 4);
  std::int64_t tiles_x = 1, columns = grid_x;
  while (columns > 24 && !fits(some_rows, columns)) columns = round_up(ceil_div(grid_x, ++tiles_x), 12);
  tiles_x = ceil_div(grid_x, columns);
  std::int64_t rows = some_rows;
  while (rows > 1 && !fits(rows, columns)) --rows;
  while (rows < grid_y && fits(rows + 1, columns)) ++rows;
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
  p.tasks = c.n * p.own[kTilesY] * p.own[kTilesX];
  p.scratch = p.own[kSinksAt] + sink_count(s) * static_cast<std::int64_t>(sizeof(Sink));
  p.partials = grid_y * tiles_x;
  return p;
}

// A rectangle of the (repeated) input, in its coordinates; it may reach over the image's edges.
struct Window {
  std::int64_t y, x, rows, columns;
};

FASTSR_INLINE void store_any(float* p, Vec v, Mask m) { store(p, v, m); }

template <typename From, typename T>
static inline void copy_source(const Shape& s, const Map& map, std::int64_t n, std::int64_t y, std::int64_t first,
                               std::int64_t count, int repeat, const float* scale, const float* shift, T* to,
                               std::int64_t channels) {
  const From* row = reinterpret_cast<const From*>(map.data) + n * map.image + y / repeat * map.row;
  const int width = map.channels;
  for (std::int64_t x = 0; x < count; ++x) {
    const From* from = row + (first + x) / repeat * map.pixel;
    for (int i = 0; i < width; i += kLanes) {
      const int lanes = width - i < kLanes ? width - i : kLanes;
      const Mask m = fastsr::cpu::first(lanes);
      Vec v = load(from + i, m);
      if (s.has_pre) v = fma(v, load(scale + i), load(shift + i));
      if (s.pre_relu) v = positive(v);
      store(to + x * channels + i, v, m);
    }
  }
}

template <typename T>
static inline void copy_window(const Conv& c, const Geometry& g, const Packed& p, std::int64_t n, const Window& w,
                               T* to) {
  const Shape& s = c.shape;
  const std::int64_t height = c.height * g.repeat, width = c.width * g.repeat;
  const std::int64_t row = w.columns * g.channels;
  const std::int64_t first = min_of(max_of(0, -w.x), w.columns);           // columns before the image
  const std::int64_t end = max_of(first, min_of(w.columns, width - w.x));  // the first behind it
  for (std::int64_t y = 0; y < w.rows; ++y, to += row) {
    if (w.y + y < 0 || w.y + y >= height) {
      std::memset(to, 0, row * sizeof(T));
      continue;
    }
    std::memset(to, 0, first * g.channels * sizeof(T));
    std::memset(to + end * g.channels, 0, (w.columns - end) * g.channels * sizeof(T));
    T* inside = to + first * g.channels;
    if (g.channels > s.cin) {
      for (std::int64_t x = 0; x < end - first; ++x) inside[x * g.channels + s.cin] = 0;
    }
    int channel = 0;
    for (int i = 0; i < s.sources; ++i) {
      const Map& map = c.in[i];
      const float *scale = p.pre_scale + channel, *shift = p.pre_shift + channel;
      if (map.type == kFloat) {
        copy_source<float>(s, map, n, w.y + y, w.x + first, end - first, g.repeat, scale, shift, inside + channel,
                           g.channels);
      } else {
        copy_source<bf16>(s, map, n, w.y + y, w.x + first, end - first, g.repeat, scale, shift, inside + channel,
                          g.channels);
      }
      channel += map.channels;
    }
  }
}

// One panel of one phase over a tile.
struct Job {
  std::int64_t y, x, rows, columns;  // of the grid
  int phases, phase_y, phase_x;
  std::int64_t valid_y, valid_x;  // of the tile's rows and columns, those that this phase has
  Axis tap_y, tap_x;
  Range inputs;
  int block;
  const Sink* sinks;
  int sink_begin, sink_end;
  float* sums;
  float* partial;  // that of the tile's first row, or null
  std::int64_t partial_row;
};

template <int kBlocks, typename T>
static inline void run_panel(const Geometry& g, const Job& job, const T* copy, std::int64_t copy_row,
                             const T* weights) {
  constexpr int kMost = kMostPixels<kBlocks>;
  const int channels = job.inputs.end - job.inputs.begin;
  // Runs of neighbouring taps are contiguous unless groups leave channels out.
  const bool joined = channels == g.channels;
  const std::int64_t a_row = copy_row;
  const T* corner = copy + (job.tap_y.offset - g.low) * a_row +
                    static_cast<std::int64_t>(job.tap_x.offset - g.low) * g.channels + job.inputs.begin;
  const int taps_x = job.tap_x.taps, taps_y = taps_x > 0 ? job.tap_y.taps : 0;
  Walk walk = {static_cast<std::int64_t>(g.stride) * g.channels, a_row, g.channels, 1, 1, 0};
  const std::int64_t sums_row = (job.columns + kMost) * kBlocks * kLanes;
  // Pieces: several rows of taps, or a part of one row.
  const std::int64_t row_length = static_cast<std::int64_t>(taps_x) * channels;
  const int rows_a_piece = taps_y == 0 ? 1 : static_cast<int>(max_of(1, min_of(taps_y, kPiece / max_of(row_length, 1))));
  std::int64_t unit = joined ? row_length : taps_x;  // what a row is cut into: inputs, or runs
  std::int64_t units_a_piece = unit;
  if (row_length > kPiece) {
    const std::int64_t pieces = ceil_div(row_length, kPiece);
    units_a_piece = joined ? round_up(ceil_div(unit, pieces), 2) : ceil_div(unit, pieces);
  }
  int ty = 0;
  std::int64_t u = 0;
  bool first = true, last = false;
  while (!last) {
    const T* a = corner + ty * a_row + u * (joined ? 1 : g.channels);
    const T* w = weights + ((ty * row_length) + u * (joined ? 1 : channels)) * kBlocks * kLanes;
    const std::int64_t units = min_of(units_a_piece, unit - u);
    walk.rows = taps_y == 0 ? 0 : static_cast<int>(min_of(rows_a_piece, taps_y - ty));
    walk.runs = joined ? 1 : static_cast<int>(units);
    walk.length = joined ? static_cast<int>(units) : channels;
    u += units;
    if (u >= unit) {
      u = 0;
      ty += walk.rows;
      last = ty >= taps_y;
    }
    const bool whole = first && last;
    for (std::int64_t y = 0; y < job.valid_y; ++y) {
      for (std::int64_t x = 0; x < job.valid_x; x += kMost) {
        const int pixels = static_cast<int>(min_of(kMost, job.valid_x - x));
        float* sums = whole ? job.sums : job.sums + y * sums_row + x * kBlocks * kLanes;
        sum_pixels<kBlocks>(pixels, a + y * g.stride * a_row + x * walk.pixel, walk, w, first, sums);
        if (!last) continue;
        for (int i = job.sink_begin; i < job.sink_end; ++i) {
          const Sink& sink = job.sinks[i];
          const float* from = sums + (sink.block - job.block) * kLanes;
          if (job.partial != nullptr) {
            finish_pixels<true>(sink, from, kBlocks * kLanes, pixels, job.y + y, job.x + x,
                                job.partial + y * job.partial_row);
          } else {
            finish_pixels<false>(sink, from, kBlocks * kLanes, pixels, job.y + y, job.x + x, nullptr);
          }
        }
      }
    }
    first = false;
  }
}

template <typename T>
static inline void run_tile(const Conv& c, const Plan& plan, std::int64_t task, void* scratch) {
  const Shape& s = c.shape;
  const Geometry g = geometry(s);
  const Packed p = unpack(s, reinterpret_cast<void*>(c.packed.data));
  const std::int64_t grid_y = ceil_div(c.out_height, g.phases), grid_x = ceil_div(c.out_width, g.phases);
  const std::int64_t tile_x = task % plan.own[kTilesX], tile_y = task / plan.own[kTilesX] % plan.own[kTilesY];
  const std::int64_t n = task / plan.own[kTilesX] / plan.own[kTilesY];
  char* memory = static_cast<char*>(scratch);
  T* copy = reinterpret_cast<T*>(memory);
  Sink* sinks = reinterpret_cast<Sink*>(memory + plan.own[kSinksAt]);

  Job job;
  job.y = tile_y * plan.own[kTileRows];
  job.x = tile_x * plan.own[kTileColumns];
  job.rows = min_of(plan.own[kTileRows], grid_y - job.y);
  job.columns = min_of(plan.own[kTileColumns], grid_x - job.x);
  job.sums = reinterpret_cast<float*>(memory + plan.own[kSumsAt]);
  job.sinks = sinks;
  job.partial = nullptr;
  job.partial_row = c.partial.row;
  if (c.partial.data != 0) {
    job.partial = reinterpret_cast<float*>(c.partial.data) + n * c.partial.image +
                  (job.y * plan.own[kTilesX] + tile_x) * c.partial.row;
    job.partial_row *= plan.own[kTilesX];
    for (std::int64_t y = 0; y < job.rows; ++y) {
      std::memset(job.partial + y * job.partial_row, 0, block_count(s) * kBlock * 4);
    }
  }

  const std::int64_t halo = g.high - g.low;
  const Window window = {job.y * g.stride + g.low, job.x * g.stride + g.low, (job.rows - 1) * g.stride + halo + 1,
                         (job.columns + 14) * g.stride + halo + 1};
  copy_window(c, g, p, n, window, copy);

  const T* weights = static_cast<const T*>(p.weights);
  job.phases = g.phases;
  for (int py = 0; py < g.phases; ++py) {
    for (int px = 0; px < g.phases; ++px) {
      job.tap_y = axis(s, py);
      job.tap_x = axis(s, px);
      job.valid_y = min_of(job.rows, ceil_div(max_of(0, c.out_height - py), g.phases) - job.y);
      job.valid_x = min_of(job.columns, ceil_div(max_of(0, c.out_width - px), g.phases) - job.x);
      const int count = make_sinks(c, n, g.phases, py, px, p.bias, p.slope, sinks);
      job.sink_end = 0;
      for (int block = 0; block < block_count(s);) {
        const Panel panel = panel_at(s, block);
        job.block = block;
        job.inputs = panel_inputs(s, panel);
        job.sink_begin = job.sink_end;
        while (job.sink_end < count && sinks[job.sink_end].block < block + panel.blocks) ++job.sink_end;
        const std::int64_t row = window.columns * g.channels;
        switch (panel.blocks) {
#if defined(__AVX512F__)
          case 4: run_panel<4>(g, job, copy, row, weights); break;
          case 3: run_panel<3>(g, job, copy, row, weights); break;
          case 2: run_panel<2>(g, job, copy, row, weights); break;
#endif
          default: run_panel<1>(g, job, copy, row, weights);
        }
        weights += panel_elements(panel, job.inputs, job.tap_y, job.tap_x);
        block += panel.blocks;
      }
    }
  }
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
