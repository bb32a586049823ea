#include "cuda/gate.cuh"

namespace fastsr::cuda {
namespace {

template <typename T>
int launch_both(const GateParams& p, void* stream) {
  const dim3 slices(kSlices, p.n);
  if (const int error = launch(sums_kernel<T>, slices, kGateThreads, kGateThreads * 4, stream, p)) return error;
  constexpr int kBytes = (kSumVectors + 9 + 2) * kMaxGate * 4;
  return launch(gate_kernel<T>, dim3(p.n), kGateThreads, kBytes, stream, p);
}

}  // namespace

int launch_gate(const GateParams& p, void* stream) {
  return p.type == kBf16 ? launch_both<__nv_bfloat16>(p, stream) : launch_both<__half>(p, stream);
}

int launch_scale(const ScaleParams& p, void* stream) {
  const std::int64_t octets = static_cast<std::int64_t>(p.n) * p.h * p.w * ((p.channels + 7) / 8);
  const dim3 grid(static_cast<unsigned>((octets + kGateThreads - 1) / kGateThreads));
  return p.type == kBf16 ? launch(scale_kernel<__nv_bfloat16>, grid, kGateThreads, 0, stream, p)
                         : launch(scale_kernel<__half>, grid, kGateThreads, 0, stream, p);
}

}  // namespace fastsr::cuda
