// CARN-M's residual-E unit in one launch: what would be four passes over memory, bound by it, becomes one.
//
// relu(x + W3 relu(W2 * relu(W1 * x + b1) + b2) + b3). W1 and W2 are 3x3 in four groups of 16 channels, which is
// exactly m16n8k16: sixteen positions of a row, sixteen input channels, two times eight outputs. A warp keeps to one
// group and holds that group's weights in registers; it walks down the rows, and each operand it loads serves the three
// output rows that read it. A tile is 14 x 16: with its halo the first layer computes 16 columns, one operand, and the
// second too.
#pragma once

#include "cuda/conv/tile.h"
#include "cuda/device.h"
#include "cuda/residual_e.h"

namespace fastsr::cuda {

template <typename T_>
struct ResidualETraits {
  using T = T_;
  static constexpr int kChannels = 64, kGroups = 4, kWarps = 8, kThreads = 32 * kWarps;
  static constexpr int kWidth = 14, kHeight = 16;             // of a tile
  static constexpr int kXWidth = 18, kXHeight = kHeight + 4;  // with a halo of two
  static constexpr int kHHeight = kHeight + 2;                // of the first layer; 16 columns, 18 apart
  static constexpr int kXPlane = 5776, kH1Plane = 5264, kH2Plane = 4112;
  static constexpr int kPitch = kChannels + 4;  // floats a position takes in the staging buffer
  static constexpr int kH1 = 8 * kXPlane;       // h1 lies behind x; h2, later, in x's place
  static constexpr int kSharedBytes = kH1 + 8 * kH1Plane;
  static constexpr int kTapWords = 16 * 16;  // elements of one 16 x 16 fragment
  static constexpr int kW2 = kGroups * 9 * kTapWords, kW3 = 2 * kW2, kBias = kW3 + kChannels * kChannels;
  static_assert(kXPlane >= kXWidth * kXHeight * 16 && kXPlane % 128 == 16);
  static_assert(kH1Plane >= kXWidth * kHHeight * 16 && kH1Plane % 128 == 16);
  static_assert(kH2Plane >= 16 * kHeight * 16 && kH2Plane % 128 == 16 && kH2Plane <= kXPlane);
  static_assert(kHeight * 16 * kPitch * 4 <= kSharedBytes, "the staging buffer takes the place of everything");
};

// One grouped 3x3 layer. from, to: planes of [position][8 channels]; rows first .. first + count - 1 of `to` are made
// from rows first .. first + count + 1 of `from`, sixteen columns each. keep(row, column): whether the position is in
// the image; elsewhere zero is written, as the next layer's padding.
template <typename Traits, typename Keep>
__device__ __forceinline__ void grouped_layer(const unsigned char* from, int from_plane, unsigned char* to,
                                              int to_plane, int to_pitch, int first, int count,
                                              const typename Traits::T* weights, const typename Traits::T* bias,
                                              int group, int lane, const Keep& keep) {
  using T = typename Traits::T;
  uint4 b[9];
#pragma unroll
  for (int tap = 0; tap < 9; ++tap) {
    b[tap] = *reinterpret_cast<const uint4*>(weights + (group * 9 + tap) * Traits::kTapWords + lane * 8);
  }
  float bias_of[2][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) bias_of[i / 2][i % 2] = to_float(bias[group * 16 + i / 2 * 8 + lane % 4 * 2 + i % 2]);
  const int matrix = lane / 8;  // this lane's row of the operand: columns 0-7 or 8-15, first or second eight channels
  from += (2 * group + matrix / 2) * from_plane + (first * Traits::kXWidth + matrix % 2 * 8 + lane % 8) * 16;
  to += 2 * group * to_plane + lane % 4 * 4;
  float acc[3][2][4] = {};  // of the rows whose last, middle and first kernel row is applied next
  for (int row = 0; row < count + 2; ++row) {
    std::uint32_t a[3][4];
#pragma unroll
    for (int dx = 0; dx < 3; ++dx) load_matrices(a[dx], from + (row * Traits::kXWidth + dx) * 16);
#pragma unroll
    for (int dx = 0; dx < 3; ++dx) {
#pragma unroll
      for (int dy = 0; dy < 3; ++dy) {
        mma<T>(acc[2 - dy][0], a[dx], b[dy * 3 + dx].x, b[dy * 3 + dx].y);
        mma<T>(acc[2 - dy][1], a[dx], b[dy * 3 + dx].z, b[dy * 3 + dx].w);
      }
    }
    if (row >= 2) {
      const int y = first + row - 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int x = half * 8 + lane / 4;
        const bool kept = keep(y, x);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          T pair[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float v = acc[0][n][2 * half + e] + bias_of[n][e];
            pair[e] = from_float<T>(!kept || v < 0.0f ? 0.0f : v);
          }
          T* at = reinterpret_cast<T*>(to + n * to_plane + (y * to_pitch + x) * 16);
          at[0] = pair[0];
          at[1] = pair[1];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      acc[0][i / 4][i % 4] = acc[1][i / 4][i % 4];
      acc[1][i / 4][i % 4] = acc[2][i / 4][i % 4];
      acc[2][i / 4][i % 4] = 0.0f;
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2) residual_e_kernel(const __grid_constant__ ResidualEParams p) {
  using T = typename Traits::T;
  FASTSR_SHARED(shared);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, n = blockIdx.z;
  const int x0 = blockIdx.x * Traits::kWidth, y0 = blockIdx.y * Traits::kHeight;
  const T* image = reinterpret_cast<const T*>(p.x.data) + n * p.x.image;
  const T* packed = reinterpret_cast<const T*>(p.packed.data);
  for (int i = thread; i < Traits::kXWidth * Traits::kXHeight * 8; i += Traits::kThreads) {
    const int octet = i % 8, position = i / 8;
    const int y = y0 - 2 + position / Traits::kXWidth, x = x0 - 2 + position % Traits::kXWidth;
    const bool real = y >= 0 && y < p.h && x >= 0 && x < p.w;
    const T* from = real ? image + y * p.x.row + static_cast<std::int64_t>(x) * p.x.pixel + octet * 8 : image;
    copy_async(shared + octet * Traits::kXPlane + position * 16, from, real);
  }
  copy_commit();
  copy_wait<0>();
  __syncthreads();

  const int group = warp % Traits::kGroups, half = warp / Traits::kGroups;
  const T* bias = packed + Traits::kBias;
  unsigned char* h1 = shared + Traits::kH1;
  grouped_layer<Traits>(shared, Traits::kXPlane, h1, Traits::kH1Plane, Traits::kXWidth, half * Traits::kHHeight / 2,
                        Traits::kHHeight / 2, packed, bias, group, lane, [&](int y, int x) {
                          const int image_y = y0 - 1 + y, image_x = x0 - 1 + x;
                          return image_y >= 0 && image_y < p.h && image_x >= 0 && image_x < p.w;
                        });
  __syncthreads();  // h1 is there, and x is no longer read
  unsigned char* h2 = shared;
  grouped_layer<Traits>(h1, Traits::kH1Plane, h2, Traits::kH2Plane, 16, half * Traits::kHeight / 2, Traits::kHeight / 2,
                        packed + Traits::kW2, bias + 64, group, lane, [](int, int) { return true; });
  __syncthreads();

  // The 1x1 layer: a warp takes two rows and all outputs.
  float acc[2][8][4] = {};
  const int matrix = lane / 8;
  const unsigned char* from = h2 + matrix / 2 * Traits::kH2Plane + (2 * warp * 16 + matrix % 2 * 8 + lane % 8) * 16;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    std::uint32_t a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) load_matrices(a[m], from + 2 * step * Traits::kH2Plane + m * 16 * 16);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const T* w = packed + Traits::kW3 + (pair * 4 + step) * Traits::kTapWords + lane * 8;
      const uint4 b = *reinterpret_cast<const uint4*>(w);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma<T>(acc[m][2 * pair], a[m], b.x, b.y);
        mma<T>(acc[m][2 * pair + 1], a[m], b.z, b.w);
      }
    }
  }
  __syncthreads();  // the staging buffer takes the place of h2
  float* staging = reinterpret_cast<float*>(shared) + warp * 32 * Traits::kPitch;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int m = i / 16, column = i / 2 % 8, far = i % 2;
    float* to = staging + (m * 16 + far * 8 + lane / 4) * Traits::kPitch + column * 8 + lane % 4 * 2;
    *reinterpret_cast<float2*>(to) = make_float2(acc[m][column][2 * far], acc[m][column][2 * far + 1]);
  }
  __syncwarp();
  const int octet = lane % 8;
  for (int i = lane / 8; i < 32; i += 4) {
    const int y = y0 + 2 * warp + i / 16, x = x0 + i % 16;
    if (i % 16 >= Traits::kWidth || y >= p.h || x >= p.w) continue;
    const Octet<T> skip =
        *reinterpret_cast<const Octet<T>*>(image + y * p.x.row + static_cast<std::int64_t>(x) * p.x.pixel + octet * 8);
    Octet<T> out;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float v =
          staging[i * Traits::kPitch + octet * 8 + e] + to_float(bias[128 + octet * 8 + e]) + to_float(skip.v[e]);
      out.v[e] = from_float<T>(v < 0.0f ? 0.0f : v);
    }
    T* to = reinterpret_cast<T*>(p.out.data) + n * p.out.image + y * p.out.row +
            static_cast<std::int64_t>(x) * p.out.pixel + octet * 8;
    *reinterpret_cast<Octet<T>*>(to) = out;
  }
}

template <typename T>
int launch_residual_e_as(const ResidualEParams& p, void* stream) {
  using Traits = ResidualETraits<T>;
  const dim3 grid(divide_up(p.w, Traits::kWidth), divide_up(p.h, Traits::kHeight), p.n);
  return launch(residual_e_kernel<Traits>, grid, Traits::kThreads, Traits::kSharedBytes, stream, p);
}

}  // namespace fastsr::cuda
