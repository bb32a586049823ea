// The convolution engine's contract: what one convolution is, and what an algorithm for it provides.
//
// Maps are stored N, H, W, C with any strides but that of the channels, which is 1. Channels are handled in blocks of
// sixteen, the last of which may be incomplete. This header is included at every instruction-set level, so it holds
// plain data and no code.
#pragma once

#include <cstdint>

namespace fastsr::cpu {

constexpr int kMaxSources = 24;
constexpr int kBlock = 16;

enum Type : std::int32_t { kFloat = 0, kBf16 = 1 };

// A (N, C, H, W) map. In a program, `data` is an offset in bytes into the tensor `slot` (-1: the workspace, -2: there is
// no map); to an algorithm, it is the address of element (0, 0, 0, 0), or 0 if there is no map.
struct Map {
  std::int64_t data;
  std::int64_t image, row, pixel;  // strides in elements
  std::int32_t slot;
  std::int32_t type;
  std::int32_t channels;
  std::int32_t reserved;
};

enum Act : std::int32_t { kNone = 0, kRelu = 1, kLeaky = 2 };  // kLeaky: the packed slopes, one per output channel

enum Form : std::int32_t {
  kDirect = 0,        // any kernel, stride and direction, over a zero-padded copy of a band of rows
  kPointwise = 1,     // 1x1, stride 1, read where the sources lie
  kNarrow = 2,        // up to four output channels: vectorised over the input channels
  kWinograd43 = 3,    // F(4x4, 3x3), points 0, +-3/4, +-3/2, infinity; with upsample = 2, the phases of nearest + 3x3
  kWinograd23 = 4,    // F(2x2, 3x3), points 0, +-1, infinity: the careful form for bfloat16
  kWinograd63 = 5,    // F(6x6, 3x3): an option, its error is near 1e-5
  kWinograd25 = 6,    // F(2x2, 5x5)
  kWinograd35 = 7,    // F(3x3, 5x5)
  kWinograd42 = 8,    // F(4x4, 2x2): the phases of 8x8 stride 4 in both directions (float32)
  kWinograd32 = 9,    // F(3x3, 2x2): the same (bfloat16 products)
  kForms = 10,
};

// All that packed weights depend on.
struct Shape {
  std::int32_t form;
  std::int32_t bf16_products;  // products of bfloat16 operands, summed in float32
  std::int32_t sources;
  std::int32_t cin, cout, groups, kernel, stride, padding;
  std::int32_t transposed, upsample, shuffle, tf_order;
  std::int32_t has_pre, pre_relu;  // the prologue: x * pre_scale + pre_shift, then ReLU; zero padding comes after it
  std::int32_t reserved;
  std::int32_t widths[kMaxSources];  // channels of each source; they add up to cin
};

// y = store(outer + outer_gain * post(modulate(gain * act(pre(x) * W + b) * scale[n, c] + skip_gain * skip)))
struct Conv {
  Shape shape;
  std::int64_t n, height, width;       // of the sources
  std::int64_t out_height, out_width;  // of the convolution, before a shuffle
  Map packed;                          // what Algorithm::pack made, as bytes
  Map in[kMaxSources];
  Map out;  // after the shuffle
  std::int32_t act, post_relu;
  float gain, skip_gain, outer_gain;
  std::int32_t skips;
  Map skip[2];  // read as one concatenation
  Map scale;    // (N, cout) floats: `image` is the stride between images
  Map factor, term;
  Map outer;
  Map partial;  // floats (N, Plan::partials, padded cout): sums of the stored values per channel, see Plan
};

// How a convolution is cut into tasks. Tasks may run in any order and on any thread. What a task computes, bit for bit,
// depends neither on the number of threads nor on the other images of a batch.
struct Plan {
  std::int64_t tasks;
  std::int64_t scratch;   // bytes that a thread needs
  std::int64_t partials;  // rows of partial channel sums an image, each written by exactly one task; for a fixed image
                          // size their number and meaning are fixed, so that adding them up in order is deterministic
  std::int64_t own[8];    // the algorithm's
};

struct Algorithm {
  // Null if this form can compute the shape, else why not.
  const char* (*refuse)(const Shape&);
  std::int64_t (*packed_bytes)(const Shape&);
  // weight: contiguous float32 in torch's layout. bias, slope: (cout) or null; pre_*: (cin) or null. packed: 64-byte
  // aligned, packed_bytes long, and wholly written.
  void (*pack)(const Shape&, const float* weight, const float* bias, const float* slope, const float* pre_scale,
               const float* pre_shift, void* packed);
  Plan (*plan)(const Conv&, int threads);
  // Runs one task. scratch: Plan::scratch bytes, 64-byte aligned, contents undefined.
  void (*run)(const Conv&, const Plan&, std::int64_t task, void* scratch);
};

// The algorithms of one instruction-set level, each family in a file of its own (direct_<level>.cpp, winograd_<level>.cpp);
// a form that is missing has null members. They are constants, as nothing of a level may run before it is chosen: a
// family's header defines `constexpr Algorithm kDirectAlgorithm = {...}` and so on, in its unnamed namespace.
constexpr int kDirectForms = 3, kWinogradForms = kForms - kDirectForms;  // kDirect..., kWinograd43...
extern const Algorithm kDirectAvx2[kDirectForms], kDirectAvx512[kDirectForms], kDirectAvx512Bf16[kDirectForms];
extern const Algorithm kWinogradAvx2[kWinogradForms], kWinogradAvx512[kWinogradForms];
extern const Algorithm kWinogradAvx512Bf16[kWinogradForms];

}  // namespace fastsr::cpu
