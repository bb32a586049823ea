#include "cpu/steps/copy.h"
#include "cpu/steps/sums.h"

namespace fastsr::cpu {

constinit const StepKernels kStepsAvx512Bf16 = {kCopy, kSums, kGate, kMean, kScale};

}  // namespace fastsr::cpu
