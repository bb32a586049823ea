// The gate of channel attention, without reading the feature map a second time.
//
// The mean of z = W * h + b over the image is linear in h: mean z[o] = b[o] + sum(W[o, i, ky, kx] S[i, ky, kx]) /
// pixels, where S[i, ky, kx] sums h[i] over the pixels that the tap reads: all of them but the last row (ky = 0) or the
// first (ky = 2), and columns likewise. The convolution that made h has left the sums of all its pixels, tile by tile;
// one kernel adds these up beside the borders, in slices, and a second, one thread block an image, makes the gate.
// Every sum has a fixed order.
#pragma once

#include "cuda/device.h"
#include "cuda/gate.h"

namespace fastsr::cuda {

constexpr int kGateThreads = 256;

// Thread blocks (kSlices, n).
template <typename T>
__global__ void __launch_bounds__(kGateThreads) sums_kernel(const __grid_constant__ GateParams p) {
  FASTSR_SHARED(shared);
  auto* parts = reinterpret_cast<float*>(shared);  // [group][feature]
  const int slice = blockIdx.x, n = blockIdx.y;
  // Features side by side, so that neighbouring threads read neighbouring addresses; groups take elements in turn.
  const int groups = kGateThreads / p.features, group = threadIdx.x / p.features, feature = threadIdx.x % p.features;
  const T* map = reinterpret_cast<const T*>(p.map.data) + n * p.map.image + feature;
  const float* partial =
      reinterpret_cast<const float*>(p.partial.data) + static_cast<std::int64_t>(n) * p.partials * p.features + feature;
  float* scratch = reinterpret_cast<float*>(p.scratch.data) +
                   static_cast<std::int64_t>(n * kSlices + slice) * kSumVectors * p.features;
  for (int vector = 0; vector < (p.weight.data != 0 ? kSumVectors : 1); ++vector) {
    const bool from_partial = vector == 0 && p.partial.data != 0;
    const int whole = vector == 0 ? p.h * p.w : vector <= 2 ? p.w : p.h;
    const int count = from_partial ? p.partials : whole;
    const int each = (count + kSlices - 1) / kSlices;
    const int end = count < (slice + 1) * each ? count : (slice + 1) * each;
    float sum = 0.0f;
    for (int i = slice * each + group; i < end && group < groups; i += groups) {
      const int y = vector == 0 ? i / p.w : vector == 1 ? 0 : vector == 2 ? p.h - 1 : i;
      const int x = vector == 0 ? i % p.w : vector <= 2 ? i : vector == 3 ? 0 : p.w - 1;
      sum += from_partial ? partial[static_cast<std::int64_t>(i) * p.features]
                          : to_float(map[y * p.map.row + static_cast<std::int64_t>(x) * p.map.pixel]);
    }
    if (group < groups) parts[group * p.features + feature] = sum;
    __syncthreads();
    if (group == 0) {
      for (int g = 1; g < groups; ++g) sum += parts[g * p.features + feature];
      scratch[vector * p.features + feature] = sum;
    }
    __syncthreads();
  }
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int far = 16; far > 0; far /= 2) v += __shfl_xor_sync(~0u, v, far);
  return v;
}

// Thread blocks (n).
template <typename T>
__global__ void __launch_bounds__(kGateThreads) gate_kernel(const __grid_constant__ GateParams p) {
  FASTSR_SHARED(shared);
  auto* sums = reinterpret_cast<float*>(shared);  // [kSumVectors][kMaxGate]
  float* taps = sums + kSumVectors * kMaxGate;    // [feature][9], or [feature] without a convolution
  float* mean = taps + 9 * kMaxGate;              // [channel]
  float* hidden = mean + kMaxGate;                // [hidden]
  const int n = blockIdx.x, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const bool convolved = p.weight.data != 0;
  const int vectors = convolved ? kSumVectors : 1;
  const float* scratch = reinterpret_cast<const float*>(p.scratch.data) +
                         static_cast<std::int64_t>(n) * kSlices * kSumVectors * p.features;
  for (int i = thread; i < vectors * p.features; i += kGateThreads) {
    float sum = 0.0f;
    for (int s = 0; s < kSlices; ++s) sum += scratch[s * kSumVectors * p.features + i];
    sums[i / p.features * kMaxGate + i % p.features] = sum;
  }
  __syncthreads();
  const T* map = reinterpret_cast<const T*>(p.map.data) + n * p.map.image;
  const int per_feature = convolved ? 9 : 1;
  for (int i = thread; i < p.features * per_feature; i += kGateThreads) {
    const int feature = i / per_feature, ky = i % per_feature / 3, kx = i % per_feature % 3;
    const float* v = sums + feature;
    float s = v[0];
    if (convolved) {
      const int left_out_y = ky == 0 ? p.h - 1 : 0, left_out_x = kx == 0 ? p.w - 1 : 0;
      if (ky != 1) s -= v[(ky == 0 ? 2 : 1) * kMaxGate];
      if (kx != 1) s -= v[(kx == 0 ? 4 : 3) * kMaxGate];
      if (ky != 1 && kx != 1) {  // taken off twice
        s += to_float(map[left_out_y * p.map.row + static_cast<std::int64_t>(left_out_x) * p.map.pixel + feature]);
      }
    }
    taps[i] = s / (static_cast<float>(p.h) * static_cast<float>(p.w));
  }
  __syncthreads();
  const auto read = [](const Map& m, int i) { return to_float(reinterpret_cast<const T*>(m.data)[i]); };
  for (int c = warp; c < p.channels; c += kGateThreads / 32) {
    float sum = 0.0f;
    if (convolved) {
      for (int i = lane; i < p.features * 9; i += 32) sum += read(p.weight, c * p.features * 9 + i) * taps[i];
      sum = warp_sum(sum) + (p.bias.data != 0 ? read(p.bias, c) : 0.0f);
    } else {
      sum = taps[c];
    }
    if (lane == 0) mean[c] = sum;
  }
  __syncthreads();
  for (int r = warp; r < p.hidden; r += kGateThreads / 32) {
    float sum = 0.0f;
    for (int c = lane; c < p.channels; c += 32) sum += read(p.down_weight, r * p.channels + c) * mean[c];
    sum = warp_sum(sum) + read(p.down_bias, r);
    if (lane == 0) hidden[r] = sum < 0.0f ? 0.0f : sum;
  }
  __syncthreads();
  for (int c = thread; c < p.channels; c += kGateThreads) {
    float sum = read(p.up_bias, c);
    for (int r = 0; r < p.hidden; ++r) sum += read(p.up_weight, c * p.hidden + r) * hidden[r];
    reinterpret_cast<float*>(p.out.data)[n * p.channels + c] = 1.0f / (1.0f + expf(-sum));
  }
}

// One thread an octet of channels of a pixel.
template <typename T>
__global__ void __launch_bounds__(kGateThreads) scale_kernel(const __grid_constant__ ScaleParams p) {
  const int octets = (p.channels + 7) / 8;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kGateThreads + threadIdx.x;
  const std::int64_t pixel = i / octets;
  const int channel = static_cast<int>(i % octets) * 8;
  const int x = static_cast<int>(pixel % p.w), y = static_cast<int>(pixel / p.w % p.h);
  const int n = static_cast<int>(pixel / p.w / p.h);
  if (n >= p.n) return;
  const auto at = [&](const Map& m) {
    return n * m.image + y * m.row + static_cast<std::int64_t>(x) * m.pixel + channel;
  };
  const T* from = reinterpret_cast<const T*>(p.x.data) + at(p.x);
  T* to = reinterpret_cast<T*>(p.out.data) + at(p.out);
  const float* gate = reinterpret_cast<const float*>(p.gate.data) + n * p.channels + channel;
  const auto factor = [&](int e) { return p.gate.data != 0 ? gate[e] : 1.0f; };
  if (p.vector) {
    Octet<T> v = *reinterpret_cast<const Octet<T>*>(from);
#pragma unroll
    for (int e = 0; e < 8; ++e) v.v[e] = from_float<T>(to_float(v.v[e]) * factor(e));
    *reinterpret_cast<Octet<T>*>(to) = v;
  } else {
    for (int e = 0; e < 8 && channel + e < p.channels; ++e) to[e] = from_float<T>(to_float(from[e]) * factor(e));
  }
}

}  // namespace fastsr::cuda
