#include "cpu/conv/conv.h"
#if __has_include("cpu/conv/direct.h")
#include "cpu/conv/direct.h"
#endif
#if __has_include("cpu/conv/pointwise.h")
#include "cpu/conv/pointwise.h"
#endif
#if __has_include("cpu/conv/narrow.h")
#include "cpu/conv/narrow.h"
#endif

namespace fastsr::cpu {

constinit const Algorithm kDirectAvx2[kDirectForms] = {
#if __has_include("cpu/conv/direct.h")
    kDirectAlgorithm,
#else
    {},
#endif
#if __has_include("cpu/conv/pointwise.h")
    kPointwiseAlgorithm,
#else
    {},
#endif
#if __has_include("cpu/conv/narrow.h")
    kNarrowAlgorithm,
#else
    {},
#endif
};

}  // namespace fastsr::cpu
