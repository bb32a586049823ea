// A map rounded to e4m3, in plain data: out = x / range[n], range[n] being a power of two that brings the image's
// largest magnitude to between 2^3 and 2^4.
#pragma once

#include "cuda/conv/conv.h"

namespace fastsr::cuda {

constexpr int kRangeSlices = 128;  // thread blocks that look for an image's largest magnitude

struct Float8Params {
  Map x;        // (n, channels, h, w), bfloat16; octets of channels are 16-byte aligned
  Map out;      // likewise, e4m3
  Map largest;  // float32 (n, kRangeSlices)
  Map range;    // float32 (n)
  std::int32_t n, h, w, channels;
};

int launch_float8(const Float8Params& p, void* stream);

}  // namespace fastsr::cuda
