// The instances of the mma.sync kernel.
#include "cuda/conv/conv_sm80.cuh"

namespace fastsr::cuda {
namespace {

template <typename T>
int launch_rows(const ConvParams& p, const Sm80Plan& plan, void* stream) {
  switch (p.rows + plan.warps) {
    case 64 + 8:
      return launch_sm80<T, 64, 8>(p, plan, stream);
    case 64 + 4:
      return launch_sm80<T, 64, 4>(p, plan, stream);
    case 32 + 8:
      return launch_sm80<T, 32, 8>(p, plan, stream);
    case 32 + 4:
      return launch_sm80<T, 32, 4>(p, plan, stream);
    case 16 + 8:
      return launch_sm80<T, 16, 8>(p, plan, stream);
    default:
      return launch_sm80<T, 16, 4>(p, plan, stream);
  }
}

}  // namespace

int launch_conv_sm80(const ConvParams& p, int sms, void* stream) {
  const Sm80Plan plan = choose_sm80(p, sms);
  if (plan.stages == 0) return kDoesNotFit;
  return p.type == kBf16 ? launch_rows<__nv_bfloat16>(p, plan, stream) : launch_rows<__half>(p, plan, stream);
}

}  // namespace fastsr::cuda
