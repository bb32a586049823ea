// Rounds a map to e4m3: one pass for the largest magnitude, another that divides and rounds. Bound by memory.
//
// The largest magnitude has to be known before anything can be rounded, and no atomic operation is needed: every thread
// block of the second pass takes the maximum of the first one's.
#include "cuda/float8.h"

#include "cuda/device.h"

namespace fastsr::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float warp_largest(float v) {
#pragma unroll
  for (int far = 16; far > 0; far /= 2) {
    const float other = __shfl_xor_sync(~0u, v, far);
    v = other > v ? other : v;
  }
  return v;
}

struct OctetOf {
  int y, x, channel;

  __device__ __forceinline__ OctetOf(const Float8Params& p, std::int64_t i) {
    const int octets = p.channels / 8;
    const std::int64_t pixel = i / octets;
    channel = static_cast<int>(i % octets) * 8;
    x = static_cast<int>(pixel % p.w);
    y = static_cast<int>(pixel / p.w);
  }
  __device__ __forceinline__ std::int64_t in(const Map& m) const {
    return y * m.row + static_cast<std::int64_t>(x) * m.pixel + channel;
  }
};

__device__ __forceinline__ std::int64_t octets_of_image(const Float8Params& p) {
  return static_cast<std::int64_t>(p.h) * p.w * (p.channels / 8);
}

__device__ __forceinline__ Octet<__nv_bfloat16> octet_at(const Float8Params& p, int n, const OctetOf& o) {
  const auto* from = reinterpret_cast<const __nv_bfloat16*>(p.x.data) + n * p.x.image + o.in(p.x);
  return *reinterpret_cast<const Octet<__nv_bfloat16>*>(from);
}

// Thread blocks (kRangeSlices, n).
__global__ void __launch_bounds__(kThreads) largest_kernel(const __grid_constant__ Float8Params p) {
  FASTSR_SHARED(shared);
  auto* warps = reinterpret_cast<float*>(shared);
  const int n = blockIdx.y, thread = threadIdx.x;
  float largest = 0.0f;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + thread; i < octets_of_image(p);
       i += kRangeSlices * kThreads) {
    const Octet<__nv_bfloat16> v = octet_at(p, n, OctetOf(p, i));
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float f = to_float(v.v[e]), magnitude = f < 0.0f ? -f : f;
      largest = magnitude > largest ? magnitude : largest;  // a NaN is not larger
    }
  }
  largest = warp_largest(largest);
  if (thread % 32 == 0) warps[thread / 32] = largest;
  __syncthreads();
  if (thread == 0) {
    for (int w = 1; w < kThreads / 32; ++w) largest = warps[w] > largest ? warps[w] : largest;
    reinterpret_cast<float*>(p.largest.data)[n * kRangeSlices + blockIdx.x] = largest;
  }
}

// What brings v to between 2^3 and 2^4, for a bfloat16's magnitude; 1 for 0. Both it and its reciprocal are normal
// numbers.
__device__ __forceinline__ float range_of(float v) {
  if (v == 0.0f) return 1.0f;
  int exponent;
  frexpf(v, &exponent);  // v is half of 2^exponent, or more
  return ldexpf(1.0f, exponent - 4 < -100 ? -100 : exponent - 4);
}

// Thread blocks (octets / kThreads, n).
__global__ void __launch_bounds__(kThreads) float8_kernel(const __grid_constant__ Float8Params p) {
  const int n = blockIdx.y, lane = threadIdx.x % 32;
  const auto* found = reinterpret_cast<const float*>(p.largest.data) + n * kRangeSlices;
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kRangeSlices / 32; ++i) {
    const float other = found[i * 32 + lane];
    largest = other > largest ? other : largest;
  }
  const float range = range_of(warp_largest(largest));
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i == 0) reinterpret_cast<float*>(p.range.data)[n] = range;
  if (i >= octets_of_image(p)) return;
  const OctetOf octet(p, i);
  const Octet<__nv_bfloat16> v = octet_at(p, n, octet);
  float f[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) f[e] = to_float(v.v[e]);
  Float8Octet o;
  o.set(f, 1.0f / range);
  *reinterpret_cast<Float8Octet*>(p.out.data + n * p.out.image + octet.in(p.out)) = o;
}

}  // namespace

int launch_float8(const Float8Params& p, void* stream) {
  if (const int error = launch(largest_kernel, dim3(kRangeSlices, p.n), kThreads, kThreads / 32 * 4, stream, p)) {
    return error;
  }
  const std::int64_t octets = static_cast<std::int64_t>(p.h) * p.w * (p.channels / 8);
  const dim3 grid(static_cast<unsigned>((octets + kThreads - 1) / kThreads), p.n);
  return launch(float8_kernel, grid, kThreads, 0, stream, p);
}

}  // namespace fastsr::cuda
