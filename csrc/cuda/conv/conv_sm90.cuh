// Convolution by wgmma for Hopper.
//
// Weights are the A operand (64 output channels = M), positions the B operand (N = 64 to 256): a 64x256x16 product
// keeps the tensor cores busy for 128 clocks and reads shared memory for 80, while the other way round both would take
// equally long. B is read in place from the halo tile: a core matrix is eight neighbouring positions, so a tap is
// another start address, and nothing is copied between the taps.
//
// A persistent grid. One warpgroup loads, two compute. Where a block's weights fit beside two stages they stay in
// shared memory, and the computing warpgroups take alternate tiles, so that the epilogue of one hides under the other's
// products. Otherwise a stage brings its chunk's weights with the halo of two tiles, one for each warpgroup.
#pragma once

#include "cuda/conv/conv.h"
#include "cuda/conv/epilogue.cuh"
#include "cuda/conv/load.cuh"
#include "cuda/conv/tile.h"
#include "cuda/device.h"

namespace fastsr::cuda {

// T: of the maps. Product: of the operands, T or e4m3.
template <typename T_, typename Product_, int kHeight_>
struct Sm90Traits {
  using T = T_;
  using Product = Product_;
  static constexpr bool kFloat8 = sizeof(Product) == 1;
  static constexpr int kHeight = kHeight_;
  static constexpr int kN = 8 * kHeight;
  static constexpr int kAcc = kN / 2;
  static constexpr int kGroup = 128;  // threads of a warpgroup
  static constexpr int kThreads = 3 * kGroup;
  static constexpr int kPasses = kHeight / 4;  // of the epilogue, 32 positions each
  // 65,536 registers for one loading and two computing warpgroups.
  static constexpr int kLoaderRegisters = 56, kComputeRegisters = 224;
  static_assert(kGroup * (kLoaderRegisters + 2 * kComputeRegisters) <= 65536);
  static_assert(kHeight % 4 == 0 && kN <= 256);
};

struct Sm90Barriers {
  std::uint64_t full[kMaxStages90], empty[kMaxStages90];
};
static_assert(sizeof(Sm90Barriers) <= kHeadBytes90);

// Stages first, .., first + length - 1, taken in turn; parity is that of the phase that the current one is in.
struct Ring {
  int first, length;
  int at = 0, parity = 0;
  __device__ __forceinline__ int stage() const {
    return first + at;
  }
  __device__ __forceinline__ void next() {
    if (++at == length) {
      at = 0;
      parity ^= 1;
    }
  }
};

// The loading warpgroup. A stage's arrival is reported one stage late, so that two are under way; but not while the
// next stage is in use, because its readers leave it only when they have begun with the one not yet reported.
template <typename Traits>
__device__ __forceinline__ void load_tiles(const ConvParams& p, const Sm90Plan& plan, Sm90Barriers& barriers,
                                           unsigned char* stages, const Block& block, int first_item, int item_step,
                                           int thread) {
  using T = typename Traits::T;
  const Chunk* chunks = tables(p).chunks + block.first_chunk;
  const int tiles = tiles_of_image(p, Traits::kHeight) * p.n;
  const int each = plan.resident ? 1 : 2;  // tiles of an item
  const int length = plan.resident ? plan.stages / 2 : plan.stages;
  Ring ring{0, length}, other{plan.resident ? length : 0, length};
  int pending = -1;
  auto report = [&] {  // what this thread has copied is there
    proxy_fence();
    if (pending >= 0) mbarrier_arrive(&barriers.full[pending]);
    pending = -1;
  };
  for (int item = first_item; item * each < tiles; item += item_step) {
    for (int c = 0; c < block.chunks; ++c) {
      const Chunk& chunk = chunks[c];
      unsigned char* stage = stages + ring.stage() * plan.stage_bytes;
      std::uint64_t* empty = &barriers.empty[ring.stage()];
      if (!mbarrier_ready(empty, ring.parity ^ 1)) {  // it is in the first round
        copy_wait<0>();
        report();
        mbarrier_wait(empty, ring.parity ^ 1);
      }
      if (!plan.resident) {
        load_weights<T, 64, Traits::kGroup>(p, stage, chunk.first_tile, chunk.taps * p.steps, thread);
        stage += plan.weights_bytes;
      }
      for (int t = 0; t < each && item * each + t < tiles; ++t) {
        const TilePlace tile = tile_place(p, item * each + t, Traits::kHeight);
        const HaloLoader<T, Traits::kGroup> loader(p, chunk, tile, Traits::kHeight);
        loader.load(stage + t * plan.halo_bytes, thread);
        if (p.has_pre) {
          copy_commit();
          copy_wait<0>();
          loader.prologue(stage + t * plan.halo_bytes, thread);
        }
      }
      copy_commit();
      copy_wait<1>();
      report();
      pending = ring.stage();
      ring.next();
    }
    if (plan.resident) {
      const Ring swapped = ring;
      ring = other;
      other = swapped;
    }
  }
  copy_wait<0>();
  report();
}

// The products of one chunk. wgmma wants straight code between fence and commit, hence one group of kSteps products a
// tap; two groups are under way at a time. Calls `done` when what came before this chunk has been read.
template <typename Product, int kN, int kSteps, typename Done>
__device__ __forceinline__ void multiply(float (&acc)[kN / 2], std::uint64_t a, std::uint64_t b,
                                         const std::int32_t* taps, int count, int b_step, const Done& done) {
  int offset = taps[0];
  for (int t = 0; t < count; ++t) {
    const std::uint64_t start = b + offset;  // addresses in a descriptor count 16 bytes, which is one position
    if (t + 1 < count) offset = taps[t + 1];
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Wgmma<Product, kN>::run(acc, a + step * (kTileBytes / 16), start + step * b_step);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (t == 0) done();
    a += kSteps * (kTileBytes / 16);
  }
}

// One of the two computing warpgroups.
template <typename Traits>
__device__ __forceinline__ void compute_tiles(const ConvParams& p, const Sm90Plan& plan, Sm90Barriers& barriers,
                                              float* staging, const unsigned char* weights, unsigned char* stages,
                                              int block_index, int first_item, int item_step, int group, int thread) {
  using T = typename Traits::T;
  const Tables table = tables(p);
  const Block& block = table.blocks[block_index];
  const Chunk* chunks = table.chunks + block.first_chunk;
  const int count = uniform(block.chunks);
  const int image_tiles = tiles_of_image(p, Traits::kHeight), tiles = image_tiles * p.n;
  const int plane = plane_bytes(Traits::kHeight * p.row_pitch + p.halo_more, p.halo_w);
  const int warp = thread / 32, lane = thread % 32, octet = thread % 8;
  const int length = plan.resident ? plan.stages / 2 : plan.stages;
  Ring ring{plan.resident ? group * length : 0, length};
  const int barrier = 1 + group;
  auto release = [&](int stage) {
    if (lane == 0) mbarrier_arrive(&barriers.empty[stage]);
  };

  const int item_tiles = plan.resident ? 1 : 2;
  // Resident: items of even turns are the first warpgroup's, those of odd turns the second's.
  int item = first_item + (plan.resident ? group * item_step : 0);
  if (plan.resident) item_step *= 2;
  for (; item * item_tiles < tiles; item += item_step) {
    const int tile_index = item * item_tiles + (plan.resident ? 0 : group);
    float acc[Traits::kAcc];
#pragma unroll
    for (int i = 0; i < Traits::kAcc; ++i) acc[i] = 0.0f;
    int previous = -1;
    for (int c = 0; c < count; ++c) {
      const int first_tile = chunks[c].first_tile, taps = uniform(chunks[c].taps);
      const std::int32_t* tap = table.taps + chunks[c].first_tap;
      const unsigned char* stage = stages + ring.stage() * plan.stage_bytes;
      const unsigned char* a_start = plan.resident ? weights + (first_tile - chunks[0].first_tile) * kTileBytes : stage;
      const unsigned char* halo = plan.resident ? stage : stage + plan.weights_bytes + group * plan.halo_bytes;
      // Of a weight tile, core matrices are neighbours along the channels every 128 bytes, along the outputs every 256.
      std::uint64_t a = wgmma_operand(shared_address(a_start), 128, 256);
      const std::uint64_t b = wgmma_operand(shared_address(halo), plane, p.row_pitch * p.halo_w * 16);
      mbarrier_wait(&barriers.full[ring.stage()], ring.parity);
      auto done = [&] {
        if (previous >= 0) release(previous);
      };
      switch (p.steps) {
        case 1:
          multiply<typename Traits::Product, Traits::kN, 1>(acc, a, b, tap, taps, 2 * plane / 16, done);
          break;
        case 2:
          multiply<typename Traits::Product, Traits::kN, 2>(acc, a, b, tap, taps, 2 * plane / 16, done);
          break;
        default:
          multiply<typename Traits::Product, Traits::kN, 4>(acc, a, b, tap, taps, 2 * plane / 16, done);
      }
      previous = ring.stage();
      ring.next();
    }
    wgmma_wait<0>();
    release(previous);
    if (tile_index >= tiles) continue;

    const TilePlace tile = tile_place(p, tile_index, Traits::kHeight);
    const Epilogue<T, Traits::kFloat8> epilogue(p, block_index, octet, tile.n);
    float sums[8] = {};
    for (int pass = 0; pass < Traits::kPasses; ++pass) {
      named_barrier(barrier, Traits::kGroup);  // the staging buffer has been read
#pragma unroll
      for (int g = 0; g < Traits::kPasses; ++g) {  // registers have no addresses: one copy of the writes for each pass
        if (g != pass) continue;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const int position = i / 4 * 8 + lane % 4 * 2 + i % 2, row = warp * 16 + lane / 4 + i / 2 % 2 * 8;
          staging[position * kStagingRows + row] = acc[g * 16 + i];
        }
      }
      named_barrier(barrier, Traits::kGroup);
      for (int position = thread / 8; position < 32; position += Traits::kGroup / 8) {
        float v[8];
        const float* from = staging + position * kStagingRows + octet * 8;
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = from[e];
        epilogue.finish(tile.y + pass * 4 + position / 8, tile.x + position % 8, v, sums);
      }
    }
    if (p.partial.data != 0) {  // in a fixed order: lanes of an octet, then warps
      named_barrier(barrier, Traits::kGroup);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        sums[e] += __shfl_xor_sync(~0u, sums[e], 8);
        sums[e] += __shfl_xor_sync(~0u, sums[e], 16);
        if (lane < 8) staging[warp * 64 + octet * 8 + e] = sums[e];
      }
      named_barrier(barrier, Traits::kGroup);
      if (thread < 8) {
        for (int e = 0; e < 8; ++e) {
          float sum = 0.0f;
          for (int w = 0; w < 4; ++w) sum += staging[w * 64 + octet * 8 + e];
          epilogue.write_partial(tile.index, image_tiles, e, sum);
        }
      }
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    conv_sm90_kernel(const __grid_constant__ ConvParams p, const __grid_constant__ Sm90Plan plan) {
  using T = typename Traits::T;
  FASTSR_SHARED(shared);
  auto& barriers = *reinterpret_cast<Sm90Barriers*>(shared);
  auto* staging = reinterpret_cast<float*>(shared + kHeadBytes90);
  unsigned char* weights = shared + kHeadBytes90 + 2 * kStagingBytes90;
  unsigned char* stages = weights + (plan.resident ? plan.weights_bytes : 0);

  // Which output block, and which of its items, this thread block takes.
  const int block_index = blockIdx.x % p.blocks;
  const int first_item = blockIdx.x / p.blocks, item_step = gridDim.x / p.blocks;
  const Block& block = tables(p).blocks[block_index];
  if (threadIdx.x == 0) {
    for (int s = 0; s < plan.stages; ++s) {
      mbarrier_init(&barriers.full[s], Traits::kGroup);
      mbarrier_init(&barriers.empty[s], plan.resident ? 4 : 8);  // one lane of each warp that reads the stage
    }
    mbarrier_init_fence();
  }
  if (plan.resident) {
    const Chunk* chunks = tables(p).chunks + block.first_chunk;
    const Chunk& last = chunks[block.chunks - 1];
    const int tiles = last.first_tile + last.taps * p.steps - chunks[0].first_tile;
    load_weights<T, 64, Traits::kThreads>(p, weights, chunks[0].first_tile, tiles, threadIdx.x);
    copy_commit();
    copy_wait<0>();
    proxy_fence();
  }
  __syncthreads();

  const int role = uniform(threadIdx.x / Traits::kGroup), thread = threadIdx.x % Traits::kGroup;
  if (role == 2) {
    registers_down<Traits::kLoaderRegisters>();
    load_tiles<Traits>(p, plan, barriers, stages, block, first_item, item_step, thread);
  } else {
    registers_up<Traits::kComputeRegisters>();
    compute_tiles<Traits>(p, plan, barriers, staging + role * (kStagingBytes90 / 4), weights, stages, block_index,
                          first_item, item_step, role, thread);
  }
}

template <typename T, typename Product, int kHeight>
int launch_sm90(const ConvParams& p, const Sm90Plan& plan, void* stream) {
  using Traits = Sm90Traits<T, Product, kHeight>;
  return launch(conv_sm90_kernel<Traits>, dim3(plan.grid), Traits::kThreads, plan.shared_bytes, stream, p, plan);
}

}  // namespace fastsr::cuda
