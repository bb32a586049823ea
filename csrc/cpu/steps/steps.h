// The contract of the steps that are no convolution: what engine.cpp needs to run one. Included at every level, so it
// holds plain data and no code. The places in a body are addresses by then; 0 says that there is nothing.
#pragma once

#include <cstdint>

#include "cpu/program.h"

namespace fastsr::cpu {

// Tasks may run in any order and on any thread; what one computes depends on neither.
template <typename Body>
struct StepKernel {
  std::int64_t (*tasks)(const Body&);
  std::int64_t (*scratch)(const Body&);  // bytes that a thread needs
  void (*run)(const Body&, std::int64_t task, void* scratch);
};

struct StepKernels {
  StepKernel<Copy> copy;
  StepKernel<Sums> sums;
  StepKernel<Gate> gate;
  StepKernel<Mean> mean;
  StepKernel<Scale> scale;
  // So many passes of arithmetic alone: of float32, and of bfloat16 products (null where there are none). The result is
  // the number of floating-point operations.
  double (*peak_fma)(std::int64_t passes);
  double (*peak_bf16)(std::int64_t passes);
};

extern const StepKernels kStepsAvx2, kStepsAvx512, kStepsAvx512Bf16;

}  // namespace fastsr::cpu
