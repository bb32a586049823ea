// A prepared list of launches, which one call walks: a block operator is one program.
#pragma once

#include "cuda/conv/conv.h"
#include "cuda/float8.h"
#include "cuda/gate.h"
#include "cuda/residual_e.h"

namespace fastsr::cuda {

enum StepKind : std::int32_t { kConvStep = 0, kGateStep = 1, kScaleStep = 2, kResidualEStep = 3, kFloat8Step = 4 };

// A program is steps one after another, each this head and then the kind's parameters; `bytes` counts both.
struct StepHead {
  std::int32_t kind, bytes;
};

}  // namespace fastsr::cuda

extern "C" {

// Launches every step of `program` on `stream` of the current device, which has `sms` multiprocessors. The maps' slots
// index `tensors`, addresses of `count` tensors. Returns 0, a CUDA error code, or a negative number: -1 no tile fits,
// -2 malformed, -3 no such kernel.
int fastsr_cuda_run(const unsigned char* program, long long bytes, void* const* tensors, int count, int sms,
                    void* stream);

// Sizes of the parameter structs, for whoever mirrors them: ConvParams, GateParams, ScaleParams, ResidualEParams,
// Float8Params, Block, Chunk.
void fastsr_cuda_struct_sizes(int (&sizes)[7]);

// The tile that fastsr_cuda_run chooses for a ConvParams: height (grid rows), stages, resident (sm_90), shared bytes.
void fastsr_cuda_tile(const unsigned char* conv, int sms, int (&tile)[4]);
}
