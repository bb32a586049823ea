// Convolution by mma.sync and cp.async: every GPU from Ampere on, and every shape of convolution.
//
// Positions are the rows of the product (M), output channels its columns. A thread block computes one tile, 8 wide and
// four rows a warp high, of one block of outputs; chunks of channels (halo and weights) go through two or three stages.
// Weights lie in shared memory in the order in which lanes hold them, so that a lane reads four registers at once.
#pragma once

#include "cuda/conv/conv.h"
#include "cuda/conv/epilogue.cuh"
#include "cuda/conv/load.cuh"
#include "cuda/conv/tile.h"
#include "cuda/device.h"

namespace fastsr::cuda {

template <typename T_, int kRows_, int kWarps_>
struct Sm80Traits {
  using T = T_;
  static constexpr int kRows = kRows_;  // output channels
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kHeight = 4 * kWarps;
  static constexpr int kPairs = kRows / 16;  // of eight columns: what four registers of weights hold
  static constexpr int kOctetsHere = kRows / 8;
  static constexpr int kPitch = kRows + 4;  // floats a position takes in the staging buffer
  static_assert(kRows % 16 == 0 && kRows <= 64, "a block has 16, 32 or 64 rows");
  static_assert(32 % kOctetsHere == 0, "a lane keeps to one octet");
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kWarps == 4 ? 2 : 1)
    conv_sm80_kernel(const __grid_constant__ ConvParams p, const __grid_constant__ Sm80Plan plan) {
  using T = typename Traits::T;
  FASTSR_SHARED(shared);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int block = blockIdx.x % p.blocks;  // those of one tile are neighbours in time, and so share what they read
  const TilePlace tile = tile_place(p, blockIdx.x / p.blocks, Traits::kHeight);
  const Tables table = tables(p);
  const Chunk* chunks = table.chunks + table.blocks[block].first_chunk;
  const int count = table.blocks[block].chunks;
  auto* warp_sums = reinterpret_cast<float*>(shared);  // [warp][row]
  unsigned char* stages = shared + Traits::kWarps * Traits::kRows * 4;

  auto issue = [&](int c) {
    if (c < count) {
      const Chunk& chunk = chunks[c];
      unsigned char* stage = stages + c % plan.stages * plan.stage_bytes;
      load_weights<T, Traits::kRows, Traits::kThreads>(p, stage, chunk.first_tile, chunk.taps * p.steps, thread);
      HaloLoader<T, Traits::kThreads>(p, chunk, tile, Traits::kHeight).load(stage + plan.weights_bytes, thread);
    }
    copy_commit();
  };

  float acc[2][2 * Traits::kPairs][4] = {};
  const int plane = plane_bytes(Traits::kHeight + p.halo_more, p.halo_w);
  // Of the A operand's four 8x8 matrices, this lane addresses a row of matrix lane / 8: upper or lower tile row, first
  // or second eight channels.
  const int matrix = lane / 8;
  const int a_offset = matrix / 2 * plane + ((4 * warp + matrix % 2) * p.halo_w + lane % 8) * 16;

  for (int c = 0; c < plan.stages - 1; ++c) issue(c);
  for (int c = 0; c < count; ++c) {
    if (plan.stages == 3) {
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    const Chunk& chunk = chunks[c];
    unsigned char* stage = stages + c % plan.stages * plan.stage_bytes;
    if (p.has_pre) {
      HaloLoader<T, Traits::kThreads>(p, chunk, tile, Traits::kHeight).prologue(stage + plan.weights_bytes, thread);
    }
    __syncthreads();  // chunk c has arrived, and everyone is done with chunk c - 1
    issue(c + plan.stages - 1);
    const unsigned char* weights = stage + lane * 16;
    const unsigned char* halo = stage + plan.weights_bytes + a_offset;
    const std::int32_t* taps = table.taps + chunk.first_tap;
    int offset = taps[0];
    for (int tap = 0; tap < chunk.taps; ++tap) {
      const unsigned char* start = halo + offset * 16;
      if (tap + 1 < chunk.taps) offset = taps[tap + 1];
      for (int step = 0; step < p.steps; ++step) {
        std::uint32_t a[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) load_matrices(a[m], start + 2 * step * plane + 2 * m * p.halo_w * 16);
#pragma unroll
        for (int pair = 0; pair < Traits::kPairs; ++pair) {
          const uint4 b = *reinterpret_cast<const uint4*>(weights + pair * 512);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            mma<T>(acc[m][2 * pair], a[m], b.x, b.y);
            mma<T>(acc[m][2 * pair + 1], a[m], b.z, b.w);
          }
        }
        weights += Traits::kRows * 32;
      }
    }
  }
  copy_wait<0>();
  __syncthreads();  // the staging buffer takes the place of the stages

  auto* staging = reinterpret_cast<float*>(stages) + warp * 32 * Traits::kPitch;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int column = 0; column < 2 * Traits::kPairs; ++column) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* to = staging + (m * 16 + half * 8 + lane / 4) * Traits::kPitch + column * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(to) = make_float2(acc[m][column][2 * half], acc[m][column][2 * half + 1]);
      }
    }
  }
  __syncwarp();
  const int octet = lane % Traits::kOctetsHere;
  const Epilogue<T> epilogue(p, block, octet, tile.n);
  float sums[8] = {};
  for (int i = lane / Traits::kOctetsHere; i < 32; i += 32 / Traits::kOctetsHere) {
    float v[8];
    const float* from = staging + i * Traits::kPitch + octet * 8;
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = from[e];
    epilogue.finish(tile.y + 4 * warp + i / 8, tile.x + i % 8, v, sums);
  }
  if (p.partial.data != 0) {  // in a fixed order: lanes of an octet, then warps
#pragma unroll
    for (int e = 0; e < 8; ++e) {
#pragma unroll
      for (int far = Traits::kOctetsHere; far < 32; far *= 2) sums[e] += __shfl_xor_sync(~0u, sums[e], far);
      if (lane < Traits::kOctetsHere) warp_sums[warp * Traits::kRows + octet * 8 + e] = sums[e];
    }
    __syncthreads();
    if (thread < Traits::kOctetsHere) {
      for (int e = 0; e < 8; ++e) {
        float sum = 0.0f;
        for (int w = 0; w < Traits::kWarps; ++w) sum += warp_sums[w * Traits::kRows + octet * 8 + e];
        epilogue.write_partial(tile.index, tiles_of_image(p, Traits::kHeight), e, sum);
      }
    }
  }
}

template <typename T, int kRows, int kWarps>
int launch_sm80(const ConvParams& p, const Sm80Plan& plan, void* stream) {
  using Traits = Sm80Traits<T, kRows, kWarps>;
  const dim3 grid(tiles_of_image(p, Traits::kHeight) * p.n * p.blocks);
  return launch(conv_sm80_kernel<Traits>, grid, Traits::kThreads, plan.shared_bytes, stream, p, plan);
}

}  // namespace fastsr::cuda
