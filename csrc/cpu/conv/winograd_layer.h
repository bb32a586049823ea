// What a Winograd form makes of a convolution, and the packed weights.
//
// Every case becomes the same one: A x A windows, M apart, of one or more planes of the input; and M x M outputs of one
// or more phases, which all come from the same windows.
//
//   plain       one plane, one phase. A kernel of more than R taps is cut into pieces of R along each axis: each piece
//               is a plane, namely the same pixels in windows shifted by R.
//   strided     stride^2 planes: every stride-th pixel from each of stride^2 origins.
//   transposed  stride^2 phases, with those taps that meet inputs in each; phases whose taps lie one row further down have
//               their outputs one row higher in the tile, so that one window, and one transform, serves all.
//   upsample    nearest, in front of the convolution: phases, whose taps are sums of the kernel's that read one input.
//
// Planes add to the inputs, so that K = planes x inputs; phases add to the outputs.
#pragma once

#include "cpu/conv/blocks.h"
#include "cpu/conv/winograd_tiles.h"

namespace fastsr::cpu {
namespace {
namespace winograd {

constexpr int kMostPhases = 16;  // along an axis
constexpr int kChunk = 96;       // of K is summed at once: sums of sums are more accurate than one long sum

struct Layer {
  int planes, phases;  // along an axis
  int origin;          // the row of the input where the window of tile 0 begins, in plane 0
  int width;           // channels of a plane of the output: a phase of the convolution, a phase of the shuffle
  int spacing;         // planes of the output begin so many channels apart in the packed order, >= width
  int outputs;         // all of the packed order, a multiple of sixteen
  int plane_inputs;    // channels of a plane of the input: each source is padded to a multiple of sixteen
  int inputs;          // of all planes: K
};

// Coordinates of both axes are alike, so one function serves both. In the plane, output q of the phase reads inputs
// q + first_input ... q + first_input + R - 1.
static inline int first_input(const Shape& s, int taps, int plane, int phase) {
  if (s.transposed) return static_cast<int>(floor_div(phase + s.padding, s.stride)) - (taps - 1);
  if (s.upsample > 1) return static_cast<int>(floor_div(phase - s.padding, s.upsample));
  if (s.stride > 1) return ((plane + s.padding) % s.stride - s.padding - plane) / s.stride;
  return plane * taps - s.padding;
}

// Which of those inputs meets row (or column) k of the kernel; negative if none does.
static inline int tap_of(const Shape& s, int taps, int plane, int phase, int k) {
  const int begin = first_input(s, taps, plane, phase);
  if (s.transposed) {  // output stride * q + phase = stride * input - padding + k
    const int distance = phase + s.padding - k;
    return distance % s.stride == 0 ? distance / s.stride - begin : -1;
  }
  if (s.upsample > 1) return static_cast<int>(floor_div(phase - s.padding + k, s.upsample)) - begin;
  if (s.stride > 1) {
    const int distance = k - s.padding - plane;
    return distance % s.stride == 0 ? distance / s.stride - begin : -1;
  }
  const int tap = k - plane * taps;
  return tap < taps ? tap : -1;
}

static inline Layer make_layer(const Shape& s, int taps) {
  Layer l;
  const bool strided = !s.transposed && s.stride > 1;
  l.planes = strided ? s.stride : s.transposed || s.upsample > 1 ? 1 : static_cast<int>(ceil_div(s.kernel, taps));
  l.phases = s.transposed ? s.stride : s.upsample;
  l.origin = first_input(s, taps, 0, 0);
  bool aligned = true;
  for (int phase = 1; phase < l.phases; ++phase) {
    const int begin = first_input(s, taps, 0, phase);
    aligned = aligned && begin == l.origin;
    l.origin = begin < l.origin ? begin : l.origin;
  }
  l.width = s.cout / (s.shuffle * s.shuffle);
  // A block of sixteen may hold the ends of several planes if they share the tile's origin.
  l.spacing = aligned ? l.width : static_cast<int>(round_up(l.width, kBlock));
  l.outputs = static_cast<int>(round_up(l.phases * l.phases * s.shuffle * s.shuffle * l.spacing, kBlock));
  l.plane_inputs = 0;
  for (int i = 0; i < s.sources; ++i) l.plane_inputs += static_cast<int>(round_up(s.widths[i], kBlock));
  l.inputs = l.planes * l.planes * l.plane_inputs;
  return l;
}

// One channel of the packed order.
struct Output {
  int phase_y, phase_x;  // of the convolution
  int shuffle;           // phase of the shuffle
  int channel;           // in the plane
  int of;                // the convolution's output channel; -1: padding
};

static inline Output output_channel(const Shape& s, const Layer& l, int position) {
  const int plane = position / l.spacing, phases = s.shuffle * s.shuffle;
  Output o = {plane / phases / l.phases, plane / phases % l.phases, plane % phases, position % l.spacing, -1};
  if (o.channel < l.width && o.phase_y < l.phases) {
    o.of = s.tf_order ? o.shuffle * l.width + o.channel : o.channel * phases + o.shuffle;
  }
  return o;
}

// Where an input channel stands in K, and back; -1 is padding.
static inline int input_position(const Shape& s, int channel) {
  int position = 0;
  for (int i = 0; i < s.sources; channel -= s.widths[i++]) {
    if (channel < s.widths[i]) return position + channel;
    position += static_cast<int>(round_up(s.widths[i], kBlock));
  }
  return position;
}

static inline int input_channel(const Shape& s, int position) {
  int channel = 0;
  for (int i = 0; i < s.sources; ++i) {
    if (position < s.widths[i]) return channel + position;
    position -= static_cast<int>(round_up(s.widths[i], kBlock));
    if (position < 0) return -1;
    channel += s.widths[i];
  }
  return -1;
}

// Blocks of sixteen outputs that read the same inputs, and are multiplied together.
struct Strip {
  int block, blocks;  // at most kPanelBlocks
  int begin, end;     // of K; even
  int chunks, chunk;  // parts of that range, each but the last of `chunk` inputs, a multiple of sixteen
  std::int64_t weights;  // bytes from the panel's first to the strip's U[chunk][position][input][output]
};

// Up to four blocks of outputs, which are stored together: one strip, or several where groups read different inputs.
struct Panel {
  static constexpr int kBlocks = 4;
  int block, blocks, strips;
  std::int64_t bytes;  // of weights
  Strip strip[kBlocks];
};

static inline Range inputs_of(const Shape& s, const Layer& l, int block) {
  if (l.planes > 1) return {0, l.inputs};  // with groups, from the first plane's first to the last plane's last
  if (s.groups == 1) return {0, s.sources == 1 ? (s.cin + 1) / 2 * 2 : l.inputs};
  const int group_in = s.cin / s.groups, group_out = s.cout / s.groups;
  int low = s.groups, high = -1;
  for (int at = block * kBlock; at < (block + 1) * kBlock;) {  // a plane's channels ascend, and so do their groups
    const Output o = output_channel(s, l, at);
    const int count = static_cast<int>(min_of((block + 1) * kBlock - at, o.of < 0 ? 1 : l.width - o.channel));
    if (o.of >= 0) {
      const int first = o.of / group_out, last = output_channel(s, l, at + count - 1).of / group_out;
      low = first < low ? first : low;
      high = last > high ? last : high;
    }
    at += count;
  }
  if (high < 0) return {0, 2};
  return {input_position(s, low * group_in) / 2 * 2, input_position(s, (high + 1) * group_in - 1) / 2 * 2 + 2};
}

// The strip that begins at a block, before `last`.
static inline Strip strip_from(const Shape& s, const Layer& l, int block, int last) {
  const Range r = inputs_of(s, l, block);
  int left = 1;
  for (; block + left < last; ++left) {
    const Range o = inputs_of(s, l, block + left);
    if (o.begin != r.begin || o.end != r.end) break;
  }
  Strip t;
  t.block = block;
  t.blocks = static_cast<int>(ceil_div(left, ceil_div(left, kPanelBlocks)));
  t.begin = r.begin;
  t.end = r.end;
  // Several planes are summed one by one, or as many at once as are short.
  const int most = l.planes == 1 || l.plane_inputs > kChunk ? kChunk : kChunk / l.plane_inputs * l.plane_inputs;
  t.chunks = static_cast<int>(ceil_div(r.end - r.begin, most));
  t.chunk = static_cast<int>(round_up(ceil_div(r.end - r.begin, t.chunks), kBlock));
  return t;
}

// The panel that begins at a block. All are about equally large: five blocks are three and two, not four and one.
static inline Panel panel_from(const Shape& s, const Layer& l, int block, int positions) {
  const int left = l.outputs / kBlock - block;
  Panel p;
  p.block = block;
  p.blocks = static_cast<int>(ceil_div(left, ceil_div(left, Panel::kBlocks)));
  p.strips = 0;
  p.bytes = 0;
  for (int at = block; at < block + p.blocks;) {
    Strip& t = p.strip[p.strips++] = strip_from(s, l, at, block + p.blocks);
    t.weights = p.bytes;
    const std::int64_t element = s.bf16_products ? 2 : 4;
    p.bytes += round_up(element * positions * (t.end - t.begin) * t.blocks * kBlock, 64);
    at += t.blocks;
  }
  return p;
}

// The packed blob: bias and slopes in packed order, zeros behind the last; the prologue's vectors in the order of a
// plane's inputs; then for every strip its transformed weights U[chunk][position][input][output], in bfloat16
// U[chunk][position][input / 2][output][2].
struct Packed {
  float *bias, *slope, *pre_scale, *pre_shift;
  char* weights;
};

static inline Packed unpack(const Layer& l, bool has_pre, void* packed) {
  Packed p;
  p.bias = static_cast<float*>(packed);
  p.slope = p.bias + l.outputs + kBlock;  // sixteen are read from any output on
  p.pre_scale = p.slope + l.outputs + kBlock;
  p.pre_shift = p.pre_scale + (has_pre ? l.plane_inputs : 0);
  p.weights = reinterpret_cast<char*>(p.pre_shift + (has_pre ? l.plane_inputs : 0));
  return p;
}

template <class Tile>
static std::int64_t packed_bytes(const Shape& s) {
  const Layer l = make_layer(s, Tile::kTaps);
  std::int64_t bytes = unpack(l, s.has_pre, nullptr).weights - static_cast<char*>(nullptr);
  for (int block = 0; block < l.outputs / kBlock;) {
    const Panel p = panel_from(s, l, block, Tile::kPositions);
    bytes += p.bytes;
    block += p.blocks;
  }
  return bytes;
}

// Which tap of the plane and phase a row (column) of the kernel is, for all of them; negative if none.
struct Taps {
  static constexpr int kMostKernel = 64;
  signed char of[kMostPhases][kMostKernel];  // [plane or phase][row of the kernel]: there are never several of both

  Taps(const Shape& s, const Layer& l, int taps) {
    for (int i = 0; i < l.planes * l.phases; ++i) {
      for (int k = 0; k < s.kernel; ++k) {
        of[i][k] = static_cast<signed char>(tap_of(s, taps, l.planes > 1 ? i : 0, l.planes > 1 ? 0 : i, k));
      }
    }
  }
};

// U of a strip: Ker g Ker^T, where g are the taps between an output and an input of K; several rows of the kernel that
// meet one input are summed.
template <class Tile>
static void pack_strip(const Shape& s, const Layer& l, const Strip& t, const float* weight, char* to) {
  constexpr int kSize = Tile::kSize, kTaps = Tile::kTaps;
  const typename Tile::Kernel ker = Tile::kernel();
  const Taps taps(s, l, kTaps);
  const int columns = t.blocks * kBlock;
  for (int column = 0; column < columns; ++column) {
    const Output o = output_channel(s, l, t.block * kBlock + column);
    for (int input = t.begin; o.of >= 0 && input < t.end; ++input) {
      const int plane = input / l.plane_inputs, channel = input_channel(s, input % l.plane_inputs);
      if (channel < 0) continue;
      const signed char* of_y = taps.of[l.planes > 1 ? plane / l.planes : o.phase_y];
      const signed char* of_x = taps.of[l.planes > 1 ? plane % l.planes : o.phase_x];
      double g[kTaps][kTaps] = {}, half[kSize][kTaps];
      for (int ky = 0; ky < s.kernel; ++ky) {
        for (int kx = 0; of_y[ky] >= 0 && kx < s.kernel; ++kx) {
          if (of_x[kx] >= 0) g[of_y[ky]][of_x[kx]] += weight_at(s, weight, o.of, channel, ky, kx);
        }
      }
      for (int y = 0; y < kSize; ++y) {
        for (int x = 0; x < kTaps; ++x) {
          half[y][x] = 0.0;
          for (int i = 0; i < kTaps; ++i) half[y][x] += ker.of[y][i] * g[i][x];
        }
      }
      const int begin = (input - t.begin) / t.chunk * t.chunk, k = input - t.begin - begin;
      const int length = static_cast<int>(min_of(t.chunk, t.end - t.begin - begin));
      std::int64_t at = static_cast<std::int64_t>(begin) * Tile::kPositions * columns;
      at += s.bf16_products ? (k / 2 * columns + column) * 2 + k % 2 : k * columns + column;
      for (int y = 0; y < kSize; ++y) {
        for (int x = 0; x < kSize; ++x, at += length * columns) {
          double u = 0.0;
          for (int i = 0; i < kTaps; ++i) u += half[y][i] * ker.of[x][i];
          if (s.bf16_products) {
            reinterpret_cast<bf16*>(to)[at] = to_bf16(static_cast<float>(u));
          } else {
            reinterpret_cast<float*>(to)[at] = static_cast<float>(u);
          }
        }
      }
    }
  }
}

template <class Tile>
static void pack(const Shape& s, const float* weight, const float* bias, const float* slope, const float* pre_scale,
                 const float* pre_shift, void* packed) {
  const Layer l = make_layer(s, Tile::kTaps);
  const Packed to = unpack(l, s.has_pre, packed);
  for (int i = 0; i < l.outputs + kBlock; ++i) {
    const int o = i < l.outputs ? output_channel(s, l, i).of : -1;
    to.bias[i] = o >= 0 && bias != nullptr ? bias[o] : 0.0f;
    to.slope[i] = o >= 0 && slope != nullptr ? slope[o] : 0.0f;
  }
  for (int i = 0; s.has_pre && i < l.plane_inputs; ++i) {
    const int channel = input_channel(s, i);
    to.pre_scale[i] = channel < 0 ? 0.0f : pre_scale != nullptr ? pre_scale[channel] : 1.0f;
    to.pre_shift[i] = channel < 0 || pre_shift == nullptr ? 0.0f : pre_shift[channel];
  }
  char* weights = to.weights;
  for (int block = 0; block < l.outputs / kBlock;) {
    const Panel p = panel_from(s, l, block, Tile::kPositions);
    std::memset(weights, 0, p.bytes);
    for (int i = 0; i < p.strips; ++i) pack_strip<Tile>(s, l, p.strip[i], weight, weights + p.strip[i].weights);
    weights += p.bytes;
    block += p.blocks;
  }
}

}  // namespace winograd
}  // namespace
}  // namespace fastsr::cpu
