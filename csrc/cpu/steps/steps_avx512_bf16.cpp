#include "cpu/steps/copy.h"

namespace fastsr::cpu {

constinit const StepKernels kStepsAvx512Bf16 = {kCopy, {}, {}, {}, {}};

}  // namespace fastsr::cpu
