// What the direct algorithms share: which output channels stand where in packed weights, which inputs a block of them
// reads, and how finished sums leave through the shared epilogue.
//
// Packed order of output channels: a shuffle's phases one after the other, each with its channels ascending; without a
// shuffle, ascending. This order is cut into blocks of sixteen. A block that holds channels of several phases has
// several segments, each of which goes somewhere else.
#pragma once

#include <cstring>

#include "cpu/conv/conv.h"
#include "cpu/conv/emit.h"
#include "cpu/simd.h"

namespace fastsr::cpu {
namespace {

FASTSR_INLINE std::int64_t min_of(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
FASTSR_INLINE std::int64_t max_of(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
FASTSR_INLINE std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }  // a >= 0, b > 0
FASTSR_INLINE std::int64_t floor_div(std::int64_t a, std::int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
FASTSR_INLINE std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }
FASTSR_INLINE std::int64_t bytes_of(const float*) { return 4; }

FASTSR_INLINE bf16 to_bf16(float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, 4);
  if (x != x) return static_cast<bf16>((u >> 16) | 0x40);
  return static_cast<bf16>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

FASTSR_INLINE int block_count(const Shape& s) { return static_cast<int>(ceil_div(s.cout, kBlock)); }
// Channels of one phase of the shuffle.
FASTSR_INLINE int phase_width(const Shape& s) { return s.cout / (s.shuffle * s.shuffle); }

// The convolution's output channel at a position of the packed order.
FASTSR_INLINE int output_at(const Shape& s, int position) {
  if (s.shuffle == 1 || s.tf_order) return position;
  const int width = phase_width(s);
  return position % width * s.shuffle * s.shuffle + position / width;
}

// Channels of the inputs that a block reads: from the first to the last that the groups of its outputs read.
struct Range {
  int begin, end;
};

static inline Range block_inputs(const Shape& s, int block) {
  if (s.groups == 1) return {0, s.cin};
  const int group_in = s.cin / s.groups, group_out = s.cout / s.groups;
  int first = s.groups, last = 0;
  for (int p = block * kBlock; p < block * kBlock + kBlock && p < s.cout; ++p) {
    const int group = output_at(s, p) / group_out;
    first = group < first ? group : first;
    last = group > last ? group : last;
  }
  return {first * group_in, (last + 1) * group_in};
}

// Neighbouring blocks that read the same inputs are computed together, up to kPanelBlocks of them.
#if defined(__AVX512F__)
constexpr int kPanelBlocks = 4;
#else
constexpr int kPanelBlocks = 1;  // a Vec is two registers of sixteen
#endif

struct Panel {
  int block, blocks;
  Range inputs;
};

// The panel that starts at a block; equal ranges are split evenly rather than into full panels and a remainder.
static inline Panel panel_at(const Shape& s, int block) {
  const Range r = block_inputs(s, block);
  const int count = block_count(s);
  int begin = block, end = block + 1;
  auto same = [&](int b) {
    const Range other = block_inputs(s, b);
    return other.begin == r.begin && other.end == r.end;
  };
  if (s.groups == 1) {
    begin = 0;
    end = count;
  } else {
    while (begin > 0 && same(begin - 1)) --begin;
    while (end < count && same(end)) ++end;
  }
  const int panels = static_cast<int>(ceil_div(end - begin, kPanelBlocks));
  // Panel i of the run holds blocks i * length / panels up to (i + 1) * length / panels.
  int i = 0;
  while ((i + 1) * (end - begin) / panels <= block - begin) ++i;
  return {block, begin + (i + 1) * (end - begin) / panels - block, r};
}

// The weight between an output and an input channel, both counted over all groups; 0 where they do not meet.
FASTSR_INLINE float weight_at(const Shape& s, const float* weight, int o, int i, int ky, int kx) {
  const int group_in = s.cin / s.groups, group_out = s.cout / s.groups;
  if (o / group_out != i / group_in) return 0.0f;
  const std::int64_t row = s.transposed ? static_cast<std::int64_t>(i) * group_out + o % group_out
                                        : static_cast<std::int64_t>(o) * group_in + i % group_in;
  return weight[(row * s.kernel + ky) * s.kernel + kx];
}

// values in the packed order of outputs, zeros behind the last; null is all zeros.
static inline void pack_outputs(const Shape& s, const float* values, float* packed) {
  for (int p = 0; p < block_count(s) * kBlock; ++p) {
    packed[p] = values != nullptr && p < s.cout ? values[output_at(s, p)] : 0.0f;
  }
}

// One segment of a block: where its lanes stand among the sixteen, and where they go.
struct Sink {
  Emit emit;
  int block, lane, lanes, channel;
};

static inline int sink_count(const Shape& s) {
  const int width = phase_width(s);
  int count = 0;
  for (int p = 0; p < s.cout; ++count) {
    p = static_cast<int>(min_of(min_of((p / kBlock + 1) * kBlock, (p / width + 1) * width), s.cout));
  }
  return count;
}

// Makes the sinks of all blocks for one image and one phase of the algorithm's own: the grid's pixel (y, x) is pixel
// (y * step + phase_y, x * step + phase_x) of the convolution's output. Returns their number.
static inline int make_sinks(const Conv& c, std::int64_t n, int step, int phase_y, int phase_x, const float* bias,
                             const float* slope, Sink* sinks) {
  const Shape& s = c.shape;
  const int width = phase_width(s), r = s.shuffle;
  int count = 0;
  for (int p = 0; p < s.cout; ++count) {
    const int end = static_cast<int>(min_of(min_of((p / kBlock + 1) * kBlock, (p / width + 1) * width), s.cout));
    const int phase = p / width;
    Sink& sink = sinks[count];
    sink.block = p / kBlock;
    sink.lane = p % kBlock;
    sink.lanes = end - p;
    sink.channel = p % width;
    const Target t = {sink.channel, sink.lanes, step * r, phase_y * r + phase / r, phase_x * r + phase % r};
    // A segment's values are moved to the first lanes, so its vectors start at its own first channel. The last block's
    // loads stay inside the packed vectors, which are followed by others.
    sink.emit = make_emit(c, n, t, bias + p, slope + p);
    if (c.scale.data != 0 && r > 1) {  // (N, cout) before the shuffle
      alignas(64) float scale[kLanes] = {};
      const float* values = reinterpret_cast<const float*>(c.scale.data) + n * c.scale.image;
      for (int i = 0; i < sink.lanes; ++i) scale[i] = c.gain * values[output_at(s, p + i)];
      sink.emit.scale = load(scale);
    }
    p = end;
  }
  return count;
}

}  // namespace
}  // namespace fastsr::cpu
