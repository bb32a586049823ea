// How a convolution is cut into tiles and stages: pure functions of the sizes, apart from the kernels that obey them.
#pragma once

#include "cuda/conv/conv.h"

namespace fastsr::cuda {

constexpr int kSharedMost90 = 227 * 1024;  // of one block on sm_90
constexpr int kSharedMost80 = 99 * 1024;   // on sm_86, sm_89 and sm_120; sm_80 has 163 KiB
constexpr int kSharedGood80 = 80 * 1024;   // two blocks of sm_80 on a multiprocessor
constexpr int kTileBytes = 64 * 16 * 2;    // weights of a block and 16 channels of one tap, at 64 rows
constexpr int kHeights90[] = {32, 16, 12, 8};

#ifdef __CUDACC__
#define FASTSR_BOTH __host__ __device__ __forceinline__
#else
#define FASTSR_BOTH inline
#endif

FASTSR_BOTH constexpr int divide_up(int a, int b) {
  return (a + b - 1) / b;
}

FASTSR_BOTH int tiles_of_image(const ConvParams& p, int height) {
  return divide_up(p.grid_h, height) * divide_up(p.grid_w, kTileColumns);
}

// Bytes between the planes of eight channels of a halo tile: 16 more than a multiple of 128, so that the octets of one
// pixel, written by neighbouring threads, fall into different banks.
FASTSR_BOTH constexpr int plane_bytes(int halo_rows, int halo_w) {
  return divide_up(halo_rows * halo_w * 16, 128) * 128 + 16;
}

inline int halo_bytes(const ConvParams& p, int height) {
  return divide_up(2 * p.steps * plane_bytes(height * p.row_pitch + p.halo_more, p.halo_w), 128) * 128;
}

// The share of the device's time that is spent on pixels of the image when tiles are `height` high: a last, partial
// wave and the tiles' parts outside the image are lost. images = 0 leaves the waves out.
inline float efficiency(const ConvParams& p, int height, int images, int workers) {
  const int tiles = tiles_of_image(p, height);
  const float inside = float(p.grid_h) * float(p.grid_w) / (float(tiles) * float(height * kTileColumns));
  if (images == 0) return inside;
  const int all = tiles * images * p.blocks;
  return inside * float(all) / (float(divide_up(all, workers)) * float(workers));
}

// Where channel sums are asked for, the height must not depend on the batch: an image alone has the same sums.
inline int images_that_count(const ConvParams& p) {
  return p.partial.data == 0 ? p.n : 0;
}

struct Sm90Plan {
  std::int32_t height;    // grid rows of a tile: wgmma's N is 8 times that
  std::int32_t resident;  // the block's weights stay in shared memory; else a stage brings its chunk's
  std::int32_t stages;
  std::int32_t stage_bytes, halo_bytes, weights_bytes;  // weights_bytes: resident, or of one stage
  std::int32_t shared_bytes;
  std::int32_t grid;  // thread blocks; each keeps to one block of outputs
};

constexpr int kStagingRows = 68;  // floats a position takes in the staging buffer: 64 and a pad against bank conflicts
constexpr int kStagingBytes90 = 32 * kStagingRows * 4;  // of one warpgroup, 32 positions at a time
constexpr int kMaxStages90 = 8;
constexpr int kHeadBytes90 = 128;  // barriers

// The layout for one height, or stages = 0 if too few stages fit: two for each computing warpgroup.
inline Sm90Plan plan_sm90(const ConvParams& p, int height, int sms) {
  Sm90Plan s{};
  s.height = height;
  s.halo_bytes = halo_bytes(p, height);
  const int fixed = kHeadBytes90 + 2 * kStagingBytes90;
  const int all_weights = p.block_tiles * kTileBytes;
  s.resident = fixed + all_weights + 4 * s.halo_bytes <= kSharedMost90;
  if (s.resident) {
    s.weights_bytes = all_weights;
    s.stage_bytes = s.halo_bytes;
  } else {  // both warpgroups work on one chunk of weights, each on a tile of its own
    s.weights_bytes = p.taps_most * p.steps * kTileBytes;
    s.stage_bytes = s.weights_bytes + 2 * s.halo_bytes;
  }
  const int room = kSharedMost90 - fixed - (s.resident ? all_weights : 0);
  s.stages = room / s.stage_bytes;
  s.stages = s.stages > kMaxStages90 ? kMaxStages90 : s.stages < 2 ? 0 : s.stages / 2 * 2;
  s.shared_bytes = fixed + (s.resident ? all_weights : 0) + s.stages * s.stage_bytes;
  const int each = sms / p.blocks > 0 ? sms / p.blocks : 1;
  const int tiles = tiles_of_image(p, height) * p.n;
  const int items = s.resident ? tiles : divide_up(tiles, 2);
  s.grid = p.blocks * (each < items ? each : items);
  return s;
}

// The best height, a wide wgmma first: N = 64 leaves no shared-memory bandwidth for anything else (64 x N x 16 takes
// N/2 clocks of arithmetic and reads its operands in N/4 + 16).
inline Sm90Plan choose_sm90(const ConvParams& p, int sms) {
  Sm90Plan best{};
  float best_value = 0;
  for (const int height : kHeights90) {
    const Sm90Plan s = plan_sm90(p, height, sms);
    if (s.stages == 0) continue;
    const int n = 8 * height;
    const float reading = float(n) / 4 + 16, math = float(n) / 2;
    const float rate = math / (math + 0.25f * reading);  // a quarter of the reads is not hidden
    const int workers = sms * (s.resident ? 1 : 2);
    const float value = rate * efficiency(p, height, images_that_count(p), workers);
    if (value > best_value * 1.02f) {
      best = s;
      best_value = value;
    }
  }
  return best;
}

struct Sm80Plan {
  std::int32_t warps;  // each takes four grid rows
  std::int32_t stages, stage_bytes, halo_bytes, weights_bytes, shared_bytes;
};

inline Sm80Plan plan_sm80(const ConvParams& p, int warps) {
  Sm80Plan s{};
  s.warps = warps;
  s.halo_bytes = halo_bytes(p, 4 * warps);
  s.weights_bytes = p.taps_most * p.steps * p.rows * 32;
  s.stage_bytes = s.weights_bytes + s.halo_bytes;
  const int head = warps * p.rows * 4;  // the warps' channel sums
  const int staging = warps * 32 * (p.rows + 4) * 4;
  // A third stage only where a second thread block still fits beside the first: it hides more than a stage does.
  s.stages = 3 * s.stage_bytes + head <= kSharedGood80 ? 3 : 2 * s.stage_bytes + head <= kSharedMost80 ? 2 : 0;
  const int pipeline = s.stages * s.stage_bytes;
  s.shared_bytes = head + (pipeline > staging ? pipeline : staging);
  return s;
}

inline Sm80Plan choose_sm80(const ConvParams& p, int sms) {
  const Sm80Plan tall = plan_sm80(p, 8), low = plan_sm80(p, 4);
  if (tall.stages == 0) return low;
  if (low.stages == 0) return tall;
  const int images = images_that_count(p);
  // A tall tile reads less halo and fewer weights; a low one wins where it fills the device better by a tenth.
  return efficiency(p, 16, images, 4 * sms) > 1.1f * efficiency(p, 32, images, 2 * sms) ? low : tall;
}

}  // namespace fastsr::cuda
