#include "cpu/conv/direct.h"
#include "cpu/conv/narrow.h"
#include "cpu/conv/pointwise.h"

namespace fastsr::cpu {

constinit const Algorithm kDirectAvx2[kDirectForms] = {kDirectAlgorithm, kPointwiseAlgorithm, kNarrowAlgorithm};

}  // namespace fastsr::cpu
