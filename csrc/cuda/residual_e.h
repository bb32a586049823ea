// CARN-M's residual-E unit in plain data: relu(x + W3 relu(W2 * relu(W1 * x + b1) + b2) + b3), W1 and W2 grouped.
#pragma once

#include "cuda/conv/conv.h"

namespace fastsr::cuda {

// 64 channels in four groups of 16. packed: fragments of W1 [group][9 taps], of W2 alike and of W3 [64 outputs][64 /
// 16], 16 x 16 each in the order of conv_sm80.cuh; then the three biases of 64.
struct ResidualEParams {
  Map x, out, packed;
  std::int32_t type, n, h, w;
};

int launch_residual_e(const ResidualEParams& p, void* stream);

}  // namespace fastsr::cuda
