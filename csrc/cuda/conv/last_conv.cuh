// The last convolution of a network: 3x3 to at most three channels, bound by memory.
//
// As a 3x3 product it would multiply nine taps by outputs that are mostly padding. Instead one 1x1 product makes, for
// every position of the halo tile, what it gives to each tap of each output: 9 x 3 = 27 of 32 columns. Nine shifted
// adds, over shared memory, are then the convolution.
#pragma once

#include "cuda/conv/conv.h"
#include "cuda/conv/epilogue.cuh"
#include "cuda/conv/load.cuh"
#include "cuda/conv/tile.h"
#include "cuda/device.h"

namespace fastsr::cuda {

template <typename T_>
struct LastTraits {
  using T = T_;
  static constexpr int kRows = 32;  // columns of the product: tap * outputs + output
  static constexpr int kWarps = 8, kThreads = 32 * kWarps;
  static constexpr int kHeight = 16, kWidth = 16;  // of a tile: one thread a pixel
  static constexpr int kHaloWidth = kWidth + 2, kPositions = (kHeight + 2) * kHaloWidth;
  static constexpr int kTiles = (kPositions + 15) / 16;  // of sixteen positions, counted along the halo's rows
  static constexpr int kOfWarp = (kTiles + kWarps - 1) / kWarps;
  static constexpr int kPlane = plane_bytes(kHeight + 2, kHaloWidth);
  // Floats between columns of the product: that of neighbouring positions, and of two columns, in different banks.
  static constexpr int kColumn = 340;
  static constexpr int kSlack = kTiles * 16 * 16 - kPlane;  // how far the last tile's positions reach over a plane
  static_assert(kHeight * kWidth == kThreads && kColumn >= kTiles * 16 && kColumn % 16 == 4);
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    last_conv_kernel(const __grid_constant__ ConvParams p, int stage_count, int stage_bytes) {
  using T = typename Traits::T;
  FASTSR_SHARED(shared);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const TilePlace tile = tile_place(p, blockIdx.x, Traits::kHeight, Traits::kWidth);
  const Chunk* chunks = tables(p).chunks;
  const int weight_bytes = p.steps * Traits::kRows * 32;

  auto issue = [&](int c) {
    if (c < p.chunks) {
      unsigned char* stage = shared + c % stage_count * stage_bytes;
      load_weights<T, Traits::kRows, Traits::kThreads>(p, stage, chunks[c].first_tile, p.steps, thread);
      HaloLoader<T, Traits::kThreads>(p, chunks[c], tile, Traits::kHeight).load(stage + weight_bytes, thread);
    }
    copy_commit();
  };

  float acc[Traits::kOfWarp][4][4] = {};
  issue(0);
  for (int c = 0; c < p.chunks; ++c) {
    copy_wait<0>();
    unsigned char* stage = shared + c % stage_count * stage_bytes;
    if (p.has_pre) {
      HaloLoader<T, Traits::kThreads>(p, chunks[c], tile, Traits::kHeight).prologue(stage + weight_bytes, thread);
    }
    __syncthreads();  // chunk c has arrived, and everyone is done with chunk c - 1
    if (c + 1 < p.chunks) issue(c + 1);
    const int matrix = lane / 8;
    const unsigned char* halo = stage + weight_bytes + matrix / 2 * Traits::kPlane + (matrix % 2 * 8 + lane % 8) * 16;
    for (int step = 0; step < p.steps; ++step) {
      const auto* weights = reinterpret_cast<const uint4*>(stage + step * Traits::kRows * 32) + lane;
      const uint4 b[2] = {weights[0], weights[32]};
#pragma unroll
      for (int i = 0; i < Traits::kOfWarp; ++i) {
        const int m = warp + i * Traits::kWarps;
        if (m >= Traits::kTiles) continue;  // the same for all lanes
        std::uint32_t a[4];
        load_matrices(a, halo + 2 * step * Traits::kPlane + m * 16 * 16);
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          mma<T>(acc[i][2 * pair], a, b[pair].x, b[pair].y);
          mma<T>(acc[i][2 * pair + 1], a, b[pair].z, b[pair].w);
        }
      }
    }
  }
  __syncthreads();  // the products take the place of the stages

  const Epilogue<T> epilogue(p, 0, 0, tile.n);
  const int outputs = epilogue.place.valid;
  auto* products = reinterpret_cast<float*>(shared);  // [tap * outputs + output][position]
#pragma unroll
  for (int i = 0; i < Traits::kOfWarp; ++i) {
    const int m = warp + i * Traits::kWarps;
    if (m >= Traits::kTiles) continue;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const int column = j / 4 * 8 + lane % 4 * 2 + j % 2, position = m * 16 + j / 2 % 2 * 8 + lane / 4;
      if (column < 9 * outputs) products[column * Traits::kColumn + position] = acc[i][j / 4][j % 4];
    }
  }
  __syncthreads();
  const int y = thread / Traits::kWidth, x = thread % Traits::kWidth;
  float v[8] = {}, sums[8];
#pragma unroll
  for (int o = 0; o < 3; ++o) {
    if (o >= outputs) continue;
    const float* from = products + o * Traits::kColumn + y * Traits::kHaloWidth + x;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
      v[o] += from[tap * outputs * Traits::kColumn + tap / 3 * Traits::kHaloWidth + tap % 3];
    }
  }
  epilogue.finish(tile.y + y, tile.x + x, v, sums);
}

template <typename T>
int launch_last(const ConvParams& p, void* stream) {
  using Traits = LastTraits<T>;
  const int stages = p.chunks > 1 ? 2 : 1;
  const int stage = divide_up(p.steps * (Traits::kRows * 32 + 2 * Traits::kPlane) + Traits::kSlack, 128) * 128;
  const int products = 27 * Traits::kColumn * 4;
  const int bytes = stages * stage > products ? stages * stage : products;
  const dim3 grid(divide_up(p.grid_w, Traits::kWidth) * divide_up(p.grid_h, Traits::kHeight) * p.n);
  return launch(last_conv_kernel<Traits>, grid, Traits::kThreads, bytes, stream, p, stages, stage);
}

}  // namespace fastsr::cuda
