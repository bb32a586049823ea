#include "cpu/steps/copy.h"
#include "cpu/steps/peak.h"
#include "cpu/steps/sums.h"

namespace fastsr::cpu {

constinit const StepKernels kStepsAvx512 = {kCopy, kSums, kGate, kMean, kScale, peak_fma, peak_bf16};

}  // namespace fastsr::cpu
