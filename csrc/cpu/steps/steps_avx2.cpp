#include "cpu/steps/copy.h"

namespace fastsr::cpu {

constinit const StepKernels kStepsAvx2 = {kCopy, {}, {}, {}, {}};

}  // namespace fastsr::cpu
