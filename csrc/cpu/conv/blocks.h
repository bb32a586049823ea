// What the direct algorithms share: which output channels stand where in packed weights, which inputs a block of them
// reads, and how finished sums leave through the shared epilogue.
//
// Packed order of output channels: a shuffle's phases one after the other, each with its channels ascending; without a
// shuffle, ascending. This order is cut into blocks of sixteen. A block that holds channels of several phases has
// several segments, each of which goes somewhere else, so that narrow phases waste no lanes.
#pragma once

#include <cstring>

#include "cpu/conv/conv.h"
#include "cpu/conv/emit.h"
#include "cpu/simd.h"

namespace fastsr::cpu {
namespace {

FASTSR_INLINE std::int64_t min_of(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}
FASTSR_INLINE std::int64_t max_of(std::int64_t a, std::int64_t b) {
  return a > b ? a : b;
}
FASTSR_INLINE std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}  // a >= 0, b > 0
FASTSR_INLINE std::int64_t floor_div(std::int64_t a, std::int64_t b) {
  return a >= 0 ? a / b : -((b - 1 - a) / b);
}
FASTSR_INLINE std::int64_t round_up(std::int64_t a, std::int64_t b) {
  return ceil_div(a, b) * b;
}

FASTSR_INLINE bf16 to_bf16(float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, 4);
  if (x != x) return static_cast<bf16>((u >> 16) | 0x40);
  return static_cast<bf16>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// How outputs are packed. `phases`: of the algorithm's own, an axis, where one block computes several of them (1: each
// is computed apart); they come before the shuffle's.
struct Outputs {
  int count;  // of all phases
  int width;  // channels of one phase, the shuffle's included: those that are stored side by side
  int phases;
  int blocks;
};

FASTSR_INLINE Outputs outputs_of(const Shape& s, int phases) {
  const int count = s.cout * phases * phases;
  return {count, s.cout / (s.shuffle * s.shuffle), phases, static_cast<int>(ceil_div(count, kBlock))};
}

// The convolution's output channel at a position of the packed order.
FASTSR_INLINE int output_at(const Shape& s, int position) {
  position %= s.cout;
  if (s.shuffle == 1 || s.tf_order) return position;
  const int width = s.cout / (s.shuffle * s.shuffle);
  return position % width * s.shuffle * s.shuffle + position / width;
}

// Channels of the inputs that a block reads: from the first to the last that the groups of its outputs read.
struct Range {
  int begin, end;
};

static inline Range block_inputs(const Shape& s, const Outputs& out, int block) {
  if (s.groups == 1) return {0, s.cin};
  const int group_in = s.cin / s.groups, group_out = s.cout / s.groups;
  int first = s.groups, last = 0;
  for (int p = block * kBlock; p < block * kBlock + kBlock && p < out.count; ++p) {
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
};

// The panel that starts at a block, among blocks [begin, end) that all read the same inputs. They are split evenly
// rather than into full panels and a remainder.
FASTSR_INLINE Panel panel_at(int block, int begin, int end) {
  const int length = end - begin, panels = static_cast<int>(ceil_div(length, kPanelBlocks));
  int i = 0;
  while ((i + 1) * length / panels <= block - begin) ++i;
  return {block, begin + (i + 1) * length / panels - block};
}

// The blocks from `block` on that read the same inputs as it does end here.
static inline int same_inputs(const Shape& s, const Outputs& out, int block) {
  if (s.groups == 1) return out.blocks;
  const Range r = block_inputs(s, out, block);
  while (++block < out.blocks) {
    const Range other = block_inputs(s, out, block);
    if (other.begin != r.begin || other.end != r.end) break;
  }
  return block;
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
static inline void pack_outputs(const Shape& s, const Outputs& out, const float* values, float* packed) {
  for (int p = 0; p < out.blocks * kBlock; ++p) {
    packed[p] = values != nullptr && p < out.count ? values[output_at(s, p)] : 0.0f;
  }
}

// Outputs of so many bytes would push everything else out of the caches before anyone reads them: they are stored past
// the caches, which also saves reading what is overwritten. Only for whole lines, and a thread that has done so ends
// with end_stream(), as such stores are not ordered.
constexpr std::int64_t kStreamedBytes = 8 << 20;

FASTSR_INLINE void end_stream() {
  _mm_sfence();
}

// One segment of a block: where its lanes stand among the sixteen, and where they go.
struct Sink {
  Emit emit;
  std::int64_t rows, columns;  // of the grid that exist in the sink's phase
  int block, lane, lanes, channel;
  bool stream;  // past the caches
};

// Where the segment that starts at a position ends.
FASTSR_INLINE int segment_end(const Outputs& out, int position) {
  const int block = (position / kBlock + 1) * kBlock, phase = (position / out.width + 1) * out.width;
  const int end = block < phase ? block : phase;
  return end < out.count ? end : out.count;
}

static inline int sink_count(const Outputs& out) {
  int count = 0;
  for (int p = 0; p < out.count; ++count) p = segment_end(out, p);
  return count;
}

// Makes the sinks of all blocks for one image. The algorithm computes a grid of which pixel (y, x) is pixel
// (y * step + phase_y, x * step + phase_x) of the convolution's output; the phase is that of the block's outputs if
// out.phases is `step`, else the one given. Returns their number.
static inline int make_sinks(const Conv& c, const Outputs& out, std::int64_t n, int step, int phase_y, int phase_x,
                             const float* bias, const float* slope, Sink* sinks) {
  const Shape& s = c.shape;
  const int r = s.shuffle;
  int count = 0;
  for (int p = 0; p < out.count; ++count) {
    const int end = segment_end(out, p);
    if (out.phases > 1) {
      phase_y = p / s.cout / out.phases;
      phase_x = p / s.cout % out.phases;
    }
    const int phase = p % s.cout / out.width;
    Sink& sink = sinks[count];
    sink.rows = ceil_div(max_of(0, c.out_height - phase_y), step);
    sink.columns = ceil_div(max_of(0, c.out_width - phase_x), step);
    sink.block = p / kBlock;
    sink.lane = p % kBlock;
    sink.lanes = end - p;
    sink.channel = p % out.width;
    // A segment's sums are moved to the first lanes, so its vectors start at its own first channel; loads behind the
    // last segment stay inside the packed weights.
    const Target t = {sink.channel, sink.lanes, step * r, phase_y * r + phase / r, phase_x * r + phase % r};
    sink.emit = make_emit(c, n, t, bias + p, slope + p);
    if (c.scale.data != 0 && r > 1) {  // (N, cout) before the shuffle
      alignas(64) float scale[kLanes] = {};
      const float* values = reinterpret_cast<const float*>(c.scale.data) + n * c.scale.image;
      for (int i = 0; i < sink.lanes; ++i) scale[i] = c.gain * values[output_at(s, p + i)];
      sink.emit.scale = load(scale);
    }
    const Emit::Place& o = sink.emit.out;
    const std::int64_t bytes = c.n * c.out_height * c.out_width * s.cout * 4;
    sink.stream = o.type == kFloat && sink.emit.whole && bytes >= kStreamedBytes && o.data % 64 == 0 &&
                  o.row % kLanes == 0 && o.pixel % kLanes == 0;
    p = end;
  }
  return count;
}

// Where pixel (y, x) of a place lies, as an element's address.
FASTSR_INLINE std::int64_t address(const Emit::Place& p, std::int64_t y, std::int64_t x) {
  return p.data + (y * p.row + x * p.pixel) * width_of(p.type);
}

// One map along a row: loads or stores the sink's lanes of one pixel after the other.
struct Stepper {
  std::int64_t at, step;
  int type;
  bool whole;
  Mask mask;

  Stepper(const Emit& e, const Emit::Place& p, std::int64_t y, std::int64_t x)
      : at(address(p, y, x)), step(p.pixel * width_of(p.type)), type(p.type), whole(e.whole), mask(e.mask) {}
};

FASTSR_INLINE Vec next(Stepper& s) {
  const std::int64_t at = s.at;
  s.at += s.step;
  if (s.type == kFloat) {
    const float* p = reinterpret_cast<const float*>(at);
    return s.whole ? load(p) : load(p, s.mask);
  }
  const bf16* p = reinterpret_cast<const bf16*>(at);
  return s.whole ? load(p) : load(p, s.mask);
}

// Finishes a row of sums, `stride` floats a pixel, and stores it. kAct: the activation, known when compiled.
template <bool kSums, int kAct, typename Out>
static inline Vec finish_simple(const Sink& sink, const float* sums, int stride, int pixels, std::int64_t y,
                                std::int64_t x) {
  const Emit& e = sink.emit;
  const Vec bias = e.bias, slope = e.slope, scale = e.scale;
  Out* out = reinterpret_cast<Out*>(address(e.out, y, x));
  const std::int64_t step = e.out.pixel;
  const Mask m = e.mask;
  Vec total = zero();
  auto done = [&](int i) {
    Vec v = add(load(sums + i * stride), bias);
    if (kAct == kRelu) v = positive(v);
    if (kAct == kLeaky) v = fma(slope, negative(v), positive(v));
    v = mul(v, scale);
    if (kSums) total = add(total, v);
    return v;
  };
  if (sizeof(Out) == 4 && sink.stream) {
    for (int i = 0; i < pixels; ++i, out += step) stream(reinterpret_cast<float*>(out), done(i));
  } else if (e.whole) {
    for (int i = 0; i < pixels; ++i, out += step) store(out, done(i));
  } else {
    for (int i = 0; i < pixels; ++i, out += step) store(out, done(i), m);
  }
  return total;
}

template <bool kSums, int kAct>
FASTSR_INLINE Vec finish_simple(const Sink& e, const float* sums, int stride, int pixels, std::int64_t y,
                                std::int64_t x) {
  return e.emit.out.type == kFloat ? finish_simple<kSums, kAct, float>(e, sums, stride, pixels, y, x)
                                   : finish_simple<kSums, kAct, bf16>(e, sums, stride, pixels, y, x);
}

template <bool kSums>
static inline Vec finish_full(const Sink& sink, const float* sums, int stride, int pixels, std::int64_t y,
                              std::int64_t x) {
  const Emit& e = sink.emit;
  const Vec bias = e.bias, scale = e.scale, skip_gain = all(e.skip_gain), outer_gain = all(e.outer_gain);
  const bool has_skip = e.skip[0].data != 0, has_factor = e.factor.data != 0, has_outer = e.outer.data != 0;
  const bool post = e.post_relu;
  Stepper skip(e, e.skip[0], y, x), factor(e, e.factor, y, x), term(e, e.term, y, x), outer(e, e.outer, y, x);
  Stepper out(e, e.out, y, x);
  Vec total = zero();
  for (int i = 0; i < pixels; ++i, out.at += out.step) {
    Vec v = mul(activate(e, add(load(sums + i * stride), bias)), scale);
    if (has_skip) v = fma(skip_gain, next(skip), v);
    if (has_factor) v = fma(v, next(factor), next(term));
    if (post) v = positive(v);
    if (has_outer) v = fma(outer_gain, v, next(outer));
    if (kSums) total = add(total, v);
    if (out.type == kFloat) {
      float* p = reinterpret_cast<float*>(out.at);
      sink.stream ? stream(p, v) : out.whole ? store(p, v) : store(p, v, out.mask);
    } else {
      bf16* p = reinterpret_cast<bf16*>(out.at);
      out.whole ? store(p, v) : store(p, v, out.mask);
    }
  }
  return total;
}

// Finishes and stores `pixels` pixels from (y, x) on: what `emit` does, for sums in memory, `stride` floats a pixel.
// What does not change along the row is found before the loop. Adds what was stored to `partial` if kSums.
template <bool kSums>
static __attribute__((noinline)) void finish_pixels(const Sink& sink, const float* sums, int stride, int pixels,
                                                    std::int64_t y, std::int64_t x, float* partial) {
  const Emit& e = sink.emit;
  if (y >= sink.rows || x >= sink.columns) return;
  if (x + pixels > sink.columns) pixels = static_cast<int>(sink.columns - x);
  Vec total = zero();
  if (sink.lane != 0 || e.skip[1].data != 0) {
    alignas(64) float moved[kLanes * 2];
    store(moved + kLanes, zero());
    for (int i = 0; i < pixels; ++i) {
      store(moved, load(sums + i * stride));
      const Vec v[1] = {load(moved + sink.lane)};
      emit<1, kSums>(e, y, x + i, 1, v, total);
    }
  } else if (!e.simple) {
    total = finish_full<kSums>(sink, sums, stride, pixels, y, x);
  } else if (e.act == kRelu) {
    total = finish_simple<kSums, kRelu>(sink, sums, stride, pixels, y, x);
  } else if (e.act == kLeaky) {
    total = finish_simple<kSums, kLeaky>(sink, sums, stride, pixels, y, x);
  } else {
    total = finish_simple<kSums, kNone>(sink, sums, stride, pixels, y, x);
  }
  if constexpr (kSums) {
    const Mask m = first(sink.lanes);
    store(partial + sink.channel, add(load(partial + sink.channel, m), total), m);
  }
}

// All sinks of the panel's blocks; `sums` are [pixel][block][16].
FASTSR_INLINE void finish_panel(const Sink* sinks, int begin, int end, const Panel& panel, const float* sums,
                                int pixels, std::int64_t y, std::int64_t x, float* partial) {
  for (int i = begin; i < end; ++i) {
    const float* from = sums + (sinks[i].block - panel.block) * kLanes;
    if (partial != nullptr) {
      finish_pixels<true>(sinks[i], from, panel.blocks * kLanes, pixels, y, x, partial);
    } else {
      finish_pixels<false>(sinks[i], from, panel.blocks * kLanes, pixels, y, x, nullptr);
    }
  }
}

}  // namespace
}  // namespace fastsr::cpu
