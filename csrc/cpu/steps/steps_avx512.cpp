#include "cpu/steps/copy.h"

namespace fastsr::cpu {

constinit const StepKernels kStepsAvx512 = {kCopy, {}, {}, {}, {}};

}  // namespace fastsr::cpu
