// 1x1 convolution of stride 1, which reads its sources where they lie: a concatenation is a list of segments.
//
// A task is a few rows of one image, worked through in strips of pixels. Sources whose type is not that of the
// products, or that have a prologue, are converted a strip at a time. Weights are packed as those of the direct form.
#pragma once

#include "cpu/conv/blocks.h"
#include "cpu/conv/direct.h"
#include "cpu/conv/products.h"

namespace fastsr::cpu {
namespace {
namespace pointwise {

constexpr int kStrip = 24;          // pixels that are finished together, a multiple of every register block's
constexpr int kStripsTogether = 4;  // that go through each panel and piece of the weights in turn
constexpr int kSegment = 64;        // channels of a segment: what is prefetched at once must not be much
constexpr int kAhead = 3;           // register blocks from the one that is summed to that which is prefetched
constexpr std::int64_t kTaskPixels = 1024;

// Some channels of a strip: pixels are `pixel` elements apart. Several segments make a piece, which is summed before it
// is added to the rest. `map`: where they lie in their source, in bytes.
template <typename T>
struct Segment {
  const T* at;
  std::int64_t pixel;
  const char* map;
  std::int64_t map_pixel;
  int length, map_bytes;
  bool ends_piece, last;
};

FASTSR_INLINE std::int64_t most_segments(const Shape& s) {
  return s.sources + s.cin / kSegment + 1;
}

static inline const char* refuse(const Shape& s) {
  if (s.kernel != 1) return "kernel is not 1";
  if (s.stride != 1) return "stride is not 1";
  if (s.padding != 0) return "padding is not 0";
  if (s.transposed) return "it is transposed";
  if (s.upsample != 1) return "it enlarges its input";
  return direct::refuse(s);
}

// Whether sources can be read where they lie. Pairs of bfloat16 must not reach into a neighbour's channels.
static inline bool in_place(const Conv& c) {
  const Shape& s = c.shape;
  if (s.has_pre || s.pre_relu) return false;
  for (int i = 0; i < s.sources; ++i) {
    if (c.in[i].type != (s.bf16_products ? kBf16 : kFloat)) return false;
    if (s.bf16_products && (c.in[i].channels % 2 != 0 || s.groups > 1)) return false;
  }
  return true;
}

// Plan::own: rows of a task, tasks an image, and where in the scratch the converted strips, the sinks, the planes and
// the segments begin.
enum Own { kRows, kTasks, kConvertedAt, kSinksAt, kPlanesAt, kSegmentsAt };

static inline Plan plan(const Conv& c, int threads) {
  const Shape& s = c.shape;
  const Outputs out = outputs_of(s, 1);
  const int channels = direct::for_planes(s, out, [](const direct::Plane&) {});
  const std::int64_t wanted = ceil_div(4 * threads, c.n);  // tasks an image that give every thread four
  const std::int64_t rows = min_of(ceil_div(kTaskPixels, c.width), max_of(1, c.height / wanted));
  Plan p = {};
  p.own[kRows] = rows;
  p.own[kTasks] = ceil_div(c.height, rows);
  p.own[kConvertedAt] = kStripsTogether * kStrip * kPanelBlocks * kLanes * 4;
  p.own[kSinksAt] = p.own[kConvertedAt];
  if (!in_place(c)) {
    p.own[kSinksAt] += round_up(kStripsTogether * kStrip * channels * (s.bf16_products ? 2 : 4), 64);
  }
  p.own[kPlanesAt] = p.own[kSinksAt] + sink_count(out) * static_cast<std::int64_t>(sizeof(Sink));
  p.own[kSegmentsAt] = p.own[kPlanesAt] + out.blocks * static_cast<std::int64_t>(sizeof(direct::Plane));
  p.scratch = p.own[kSegmentsAt] + most_segments(s) * static_cast<std::int64_t>(sizeof(Segment<float>));
  p.tasks = c.n * p.own[kTasks];
  p.partials = c.height;
  return p;
}

// Sums over the segments of one piece for kPixels pixels from x on, stored as [pixel][block][16]. Meanwhile the pixels
// `ahead` further are brought near, if it is not 0.
template <int kPixels, int kBlocks, typename T>
static inline void sum_segments(const Segment<T>* segment, int x, const T* w, bool first, int ahead, float* sums) {
  Vec acc[kPixels][kBlocks];
  FASTSR_UNROLL for (int i = 0; i < kPixels; ++i) {
    FASTSR_UNROLL for (int j = 0; j < kBlocks; ++j) acc[i][j] = zero();
  }
  for (;; ++segment) {
    for (int i = 0; ahead != 0 && i < kPixels; ++i) {
      const char* next = segment->map + (x + i + ahead) * segment->map_pixel;
      for (int b = 0; b < segment->map_bytes; b += 64) _mm_prefetch(next + b, _MM_HINT_T0);
    }
    add_products<kPixels, kBlocks>(segment->at + x * segment->pixel, segment->pixel, w, segment->length, acc);
    w += static_cast<std::int64_t>(segment->length) * kLanes * kBlocks;
    if (segment->ends_piece) break;
  }
  FASTSR_UNROLL for (int i = 0; i < kPixels; ++i) {
    FASTSR_UNROLL for (int j = 0; j < kBlocks; ++j) {
      float* at = sums + (i * kBlocks + j) * kLanes;
      store(at, first ? acc[i][j] : add(load(at), acc[i][j]));
    }
  }
}

// The pixels of a strip through one panel; see sum_segments about `ahead`, -1 stands for kAhead register blocks.
template <int kBlocks, typename T>
static inline void sum_panel(const Segment<T>* segment, const T* w, int pixels, int ahead, float* sums) {
  constexpr int kMost = kMostPixels<kBlocks>, kMore = kMost * 2 / 3, kFew = kMost / 3;
  if (ahead < 0) ahead = kAhead * kMost;
  for (bool first = true;; first = false) {
    for (int x = 0; x < pixels;) {  // pixels behind the last do not exist: only whole register blocks
      const int left = pixels - x;
      float* to = sums + x * kBlocks * kLanes;
      if (left >= kMost) {
        sum_segments<kMost, kBlocks>(segment, x, w, first, ahead, to);
        x += kMost;
      } else if (left >= kMore) {
        sum_segments<kMore, kBlocks>(segment, x, w, first, ahead, to);
        x += kMore;
      } else if (left >= kFew) {
        sum_segments<kFew, kBlocks>(segment, x, w, first, ahead, to);
        x += kFew;
      } else {
        sum_segments<1, kBlocks>(segment, x, w, first, ahead, to);
        x += 1;
      }
    }
    for (bool ends = false; !ends; ++segment) {
      if (segment->last) return;
      ends = segment->ends_piece;
      w += static_cast<std::int64_t>(segment->length) * kLanes * kBlocks;
    }
  }
}

// Whether rows of a map follow one another without a gap.
FASTSR_INLINE bool joined(const Map& m, std::int64_t width) {
  return m.data == 0 || m.row == width * m.pixel;
}

static inline bool all_joined(const Conv& c) {
  bool all = c.shape.shuffle == 1 && c.partial.data == 0 && joined(c.out, c.width) && joined(c.factor, c.width) &&
             joined(c.term, c.width) && joined(c.outer, c.width);
  for (int i = 0; i < c.shape.sources; ++i) all = all && joined(c.in[i], c.width);
  for (int i = 0; i < c.skips; ++i) all = all && joined(c.skip[i], c.width);
  return all;
}

// Cuts a plane's channels into segments and pieces, for the strip that begins at pixel (y, x). converted: the plane's
// inputs, or null if they are read in place.
template <typename T>
static inline void cut(const Conv& c, const direct::Plane& plane, const T* converted, std::int64_t n, std::int64_t y,
                       std::int64_t x, Segment<T>* segment) {
  const Shape& s = c.shape;
  int source = 0, begin = 0, in_piece = 0;
  for (int k = 0; k < plane.width;) {
    const int channel = plane.inputs.begin + k;
    while (begin + s.widths[source] <= channel) begin += s.widths[source++];
    int length = static_cast<int>(min_of(min_of(kSegment, begin + s.widths[source] - channel), plane.width - k));
    if (s.bf16_products) length += length % 2;  // of converted inputs
    const Map& m = c.in[source];
    const std::int64_t size = width_of(m.type);
    segment->map =
        reinterpret_cast<const char*>(m.data + (n * m.image + y * m.row + x * m.pixel + channel - begin) * size);
    segment->map_pixel = m.pixel * size;
    segment->map_bytes = static_cast<int>(length * size);
    segment->at = converted != nullptr ? converted + k : reinterpret_cast<const T*>(segment->map);
    segment->pixel = converted != nullptr ? plane.width : m.pixel;
    segment->length = length;
    k += length;
    in_piece += length;
    segment->last = k >= plane.width;
    segment->ends_piece = segment->last || in_piece + kSegment > direct::kPiece;
    if (segment->ends_piece) in_piece = 0;
    ++segment;
  }
}

template <typename T>
static inline void run_rows(const Conv& c, const Plan& plan, std::int64_t task, void* scratch) {
  const Shape& s = c.shape;
  const direct::Geometry g = direct::geometry(s);
  const Outputs out = outputs_of(s, 1);
  const direct::Packed p = direct::unpack(s, out, reinterpret_cast<void*>(c.packed.data));
  char* memory = static_cast<char*>(scratch);
  float* sums = reinterpret_cast<float*>(memory);
  T* converted = reinterpret_cast<T*>(memory + plan.own[kConvertedAt]);
  Sink* sinks = reinterpret_cast<Sink*>(memory + plan.own[kSinksAt]);
  direct::Plane* planes = reinterpret_cast<direct::Plane*>(memory + plan.own[kPlanesAt]);
  Segment<T>* segments = reinterpret_cast<Segment<T>*>(memory + plan.own[kSegmentsAt]);
  int plane_count = 0;
  const int channels = direct::for_planes(s, out, [&](const direct::Plane& plane) { planes[plane_count++] = plane; });

  const std::int64_t n = task / plan.own[kTasks], first_row = task % plan.own[kTasks] * plan.own[kRows];
  std::int64_t rows = min_of(plan.own[kRows], c.height - first_row), width = c.width;
  const int sink_count = make_sinks(c, out, n, 1, 0, 0, p.bias, p.slope, sinks);
  if (all_joined(c)) {  // one long row
    width *= rows;
    rows = 1;
    for (int i = 0; i < sink_count; ++i) sinks[i].columns = width;
  }
  const bool direct_read = in_place(c);
  const int panels = static_cast<int>(ceil_div(out.blocks, kPanelBlocks));
  const std::int64_t together = panels == 1 && s.cin <= direct::kPiece ? kStrip : kStripsTogether * kStrip;

  for (std::int64_t y = first_row; y < first_row + rows; ++y) {
    float* partial = nullptr;
    if (c.partial.data != 0) {
      partial = reinterpret_cast<float*>(c.partial.data) + n * c.partial.image + y * c.partial.row;
      std::memset(partial, 0, round_up(s.cout, kBlock) * 4);
    }
    for (std::int64_t x = 0; x < width; x += together) {
      const int pixels = static_cast<int>(min_of(together, width - x));
      if (!direct_read) {
        direct::Copy<T> copy = {n, c.height,          width,     y,      x,          1, pixels, pixels,
                                0, pixels * channels, converted, planes, plane_count};
        direct::make_row(c, g, p, copy);
      }
      const T* weights = static_cast<const T*>(p.weights);
      int sink = 0;
      for (int k = 0; k < plane_count; ++k) {
        const direct::Plane& plane = planes[k];
        cut<T>(c, plane, direct_read ? nullptr : converted + pixels * plane.begin, n, y, x, segments);
        for (int block = plane.first_block; block < plane.end_block;) {
          const Panel panel = panel_at(block, plane.first_block, plane.end_block);
          // The first panel brings the next pixels near, of converted sources the next strip.
          const int ahead = block > plane.first_block ? 0 : direct_read ? -1 : static_cast<int>(together);
          switch (panel.blocks) {
#if defined(__AVX512F__)
            case 4:
              sum_panel<4>(segments, weights, pixels, ahead, sums);
              break;
            case 3:
              sum_panel<3>(segments, weights, pixels, ahead, sums);
              break;
            case 2:
              sum_panel<2>(segments, weights, pixels, ahead, sums);
              break;
#endif
            default:
              sum_panel<1>(segments, weights, pixels, ahead, sums);
          }
          int sink_end = sink;
          while (sink_end < sink_count && sinks[sink_end].block < block + panel.blocks) ++sink_end;
          finish_panel(sinks, sink, sink_end, panel, sums, pixels, y, x, partial);
          sink = sink_end;
          weights += static_cast<std::int64_t>(plane.width) * panel.blocks * kLanes;
          block += panel.blocks;
        }
      }
    }
  }
  end_stream();
}

static inline void run(const Conv& c, const Plan& plan, std::int64_t task, void* scratch) {
#if defined(__AVX512BF16__)
  if (c.shape.bf16_products) return run_rows<bf16>(c, plan, task, scratch);
#endif
  run_rows<float>(c, plan, task, scratch);
}

}  // namespace pointwise

constexpr Algorithm kPointwiseAlgorithm = {pointwise::refuse, direct::packed_bytes, direct::pack, pointwise::plan,
                                           pointwise::run};

}  // namespace
}  // namespace fastsr::cpu
