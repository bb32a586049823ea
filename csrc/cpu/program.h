// What `fastsr_cpu::run` walks: a `Program`, then its steps, each a `Step` followed by the body of its kind. All of it is
// plain data of one layout, a multiple of eight bytes long, which fastsr/_cpu.py mirrors; `struct_sizes` compares the two.
//
// Places are offsets in bytes into a tensor of the call, chosen by `slot`, or into the workspace (slot -1), a block of
// memory that lives as long as the call. Slot -2 says that there is nothing.
#pragma once

#include <cstdint>

#include "cpu/conv/conv.h"

namespace fastsr::cpu {

constexpr std::int32_t kWorkspace = -1, kAbsent = -2;

struct Program {
  std::int64_t steps;
  std::int64_t workspace_bytes;
};

enum Kind : std::int32_t { kConvStep = 0, kCopyStep = 1, kSumsStep = 2, kGateStep = 3, kMeanStep = 4, kScaleStep = 5 };

struct Step {
  std::int32_t kind;
  std::int32_t bytes;  // of the body that follows
};

// A (N, C, H, W) map with any strides, in elements.
struct Strided {
  std::int64_t data;
  std::int64_t image, channel, row, pixel;
  std::int32_t slot;
  std::int32_t type;
};

// Floats in a row.
struct Floats {
  std::int64_t data;
  std::int32_t slot;
  std::int32_t reserved;
};

// to = from, converted to the type of `to`: from one layout to another.
struct Copy {
  std::int64_t n, channels, height, width;
  Strided from, to;
};

// out[n, c, ky, kx] = the sum of `in` over the pixels that tap (ky, kx) of a zero-padded 3x3 convolution reads. The sum
// over the whole image is that of the `rows` rows of `partial`, which the convolution that stored `in` filled.
struct Sums {
  std::int64_t n, height, width, rows;
  Map partial;
  Map in;
  Floats out;  // (N, C, 3, 3)
};

// mean[n, o] = bias[o] + sum over i, t of weight[o, i, t] sums[n, i, t] / pixels;
// out[n, o] = sigmoid(up_bias[o] + up_weight relu(down_bias + down_weight mean[n])).
struct Gate {
  std::int64_t n, inputs, outputs, hidden;
  std::int64_t taps;    // 9
  std::int64_t pixels;  // of an image
  Floats sums;          // (N, inputs, taps)
  Floats weight;        // (outputs, inputs, taps); if absent, the mean is `sums` itself: inputs = outputs, taps = 1
  Floats bias;          // (outputs), or absent
  Floats down_weight;   // (hidden, outputs)
  Floats down_bias;     // (hidden)
  Floats up_weight;     // (outputs, hidden)
  Floats up_bias;       // (outputs)
  Floats out;           // (N, outputs)
};

// out[n, c] = the mean of in[n, c] over the image.
struct Mean {
  std::int64_t n, height, width;
  Map in;
  Floats out;  // (N, C)
};

// out = in * scale[n, c].
struct Scale {
  std::int64_t n, height, width;
  Map in;
  Floats scale;  // (N, C)
  Map out;
};

}  // namespace fastsr::cpu
