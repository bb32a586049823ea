// The instances of the Hopper kernel.
#include "cuda/conv/conv_sm90.cuh"

namespace fastsr::cuda {
namespace {

template <typename T, typename Product>
int launch_height(const ConvParams& p, const Sm90Plan& plan, void* stream) {
  switch (plan.height) {
    case 32:
      return launch_sm90<T, Product, 32>(p, plan, stream);
    case 16:
      return launch_sm90<T, Product, 16>(p, plan, stream);
    case 12:
      return launch_sm90<T, Product, 12>(p, plan, stream);
    default:
      return launch_sm90<T, Product, 8>(p, plan, stream);
  }
}

}  // namespace

int launch_conv_sm90(const ConvParams& p, int sms, void* stream) {
  const Sm90Plan plan = choose_sm90(p, sms);
  if (plan.stages == 0) return kDoesNotFit;
  if (p.range.data != 0) return launch_height<__nv_bfloat16, __nv_fp8_e4m3>(p, plan, stream);
  return p.type == kBf16 ? launch_height<__nv_bfloat16, __nv_bfloat16>(p, plan, stream)
                         : launch_height<__half, __half>(p, plan, stream);
}

}  // namespace fastsr::cuda
