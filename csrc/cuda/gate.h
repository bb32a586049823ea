// Channel attention in plain data: means of a map over the image, and the gate made from them.
#pragma once

#include "cuda/conv/conv.h"

namespace fastsr::cuda {

constexpr int kSlices = 32;     // thread blocks an image's sums are cut into
constexpr int kSumVectors = 5;  // all pixels, first row, last row, first column, last column
constexpr int kMaxGate = 256;   // channels, of the map and of the gate

struct GateParams {
  Map map;      // (n, features, h, w): what is averaged
  Map partial;  // float32 (n, partials, features): sums of all its pixels; none: they are taken from the map
  Map scratch;  // float32 (n, kSlices, kSumVectors, features)
  Map weight;   // (channels, features, 3, 3): a zero-padded convolution between the map and the mean; none: no such
  Map bias;     // (channels)
  Map down_weight, down_bias, up_weight, up_bias;  // (hidden, channels), (hidden), (channels, hidden), (channels)
  Map out;                                         // float32 (n, channels)
  std::int32_t type, n, h, w, features, channels, hidden, partials;
};

// out = x * gate, or x where there is no gate: maps (n, channels, h, w).
struct ScaleParams {
  Map x, gate, out;
  std::int32_t type, n, h, w, channels, vector;
};

int launch_gate(const GateParams& p, void* stream);
int launch_scale(const ScaleParams& p, void* stream);

}  // namespace fastsr::cuda
