#include "cuda/residual_e.cuh"

namespace fastsr::cuda {

int launch_residual_e(const ResidualEParams& p, void* stream) {
  return p.type == kBf16 ? launch_residual_e_as<__nv_bfloat16>(p, stream) : launch_residual_e_as<__half>(p, stream);
}

}  // namespace fastsr::cuda
