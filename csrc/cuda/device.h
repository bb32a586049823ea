// What a kernel may use beside CUDA C++ itself: the PTX instructions, dynamic shared memory and the launch.
//
// nvcc takes the instructions from ptx.h. A host compiler takes functions of the same names that act on emulated
// threads (tests/emulation), so that the very same kernels run, and are tested, without a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#ifdef __CUDACC__
#include "cuda/ptx.h"
#else
#include "emulation.h"
#endif

namespace fastsr::cuda {

template <typename T>
__device__ __forceinline__ float to_float(T v);
template <>
__device__ __forceinline__ float to_float(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
template <>
__device__ __forceinline__ float to_float(__half v) {
  return __half2float(v);
}
template <>
__device__ __forceinline__ float to_float(float v) {
  return v;
}

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float v) {
  return __float2bfloat16(v);
}
template <>
__device__ __forceinline__ __half from_float(float v) {
  return __float2half(v);
}

// Eight neighbouring channels of one pixel: what is loaded, stored and finished at a time.
template <typename T>
struct alignas(16) Octet {
  T v[8];
};

// The same in e4m3.
struct alignas(8) Float8Octet {
  __nv_fp8x2_storage_t v[4];

  // v * by, to the nearest; what is too large becomes the largest number.
  __device__ __forceinline__ void set(const float (&from)[8], float by) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      v[e] = __nv_cvt_float2_to_fp8x2(float2{from[2 * e] * by, from[2 * e + 1] * by}, __NV_SATFINITE, __NV_E4M3);
    }
  }
};

#ifdef __CUDACC__

// Launches `kernel` and returns a CUDA error code, 0 if there is none.
template <typename... Args>
int launch(void (*kernel)(Args...), dim3 grid, int threads, int shared_bytes, void* stream, const Args&... args) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  return cudaGetLastError();
}

#endif

}  // namespace fastsr::cuda
