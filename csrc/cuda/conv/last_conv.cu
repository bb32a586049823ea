#include "cuda/conv/last_conv.cuh"

namespace fastsr::cuda {

int launch_last_conv(const ConvParams& p, void* stream) {
  return p.type == kBf16 ? launch_last<__nv_bfloat16>(p, stream) : launch_last<__half>(p, stream);
}

}  // namespace fastsr::cuda
