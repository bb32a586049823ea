#include "cpu/conv/direct.h"
#if __has_include("cpu/conv/narrow.h")
#include "cpu/conv/narrow.h"
#endif
#include "cpu/conv/pointwise.h"

namespace fastsr::cpu {

constinit const Algorithm kDirectAvx512Bf16[kDirectForms] = {
    kDirectAlgorithm,
    kPointwiseAlgorithm,
#if __has_include("cpu/conv/narrow.h")
    kNarrowAlgorithm,
#else
    {},
#endif
};

}  // namespace fastsr::cpu
