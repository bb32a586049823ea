// Brings the halo tile of one chunk into shared memory: planes of [position][8 channels], so that eight neighbouring
// positions of a row are 128 contiguous bytes (a core matrix of wgmma, a conflict-free ldmatrix) and a tap is nothing
// but another start address.
#pragma once

#include "cuda/conv/conv.h"
#include "cuda/conv/tile.h"
#include "cuda/device.h"

namespace fastsr::cuda {

struct Tables {
  const Block* blocks;
  const Chunk* chunks;
  const std::int32_t* taps;
};

__device__ __forceinline__ Tables tables(const ConvParams& p) {
  const auto* blocks = reinterpret_cast<const Block*>(p.table.data);
  const auto* chunks = reinterpret_cast<const Chunk*>(blocks + p.blocks);
  return {blocks, chunks, reinterpret_cast<const std::int32_t*>(chunks + p.chunks)};
}

struct TilePlace {
  int n, index, y, x;  // image, index within it, first position
};

__device__ __forceinline__ TilePlace tile_place(const ConvParams& p, int tile, int height, int width = kTileColumns) {
  const int across = divide_up(p.grid_w, width);
  const int image = across * divide_up(p.grid_h, height);
  const int index = tile % image;
  return {tile / image, index, index / across * height, index % across * width};
}

// The pieces of 16 bytes that thread `thread` of kThreads loads: octet `octet` of halo positions (y, x).
template <int kThreads>
struct Pieces {
  int octet, y, x, step_y, step_x, halo_w, rows;

  __device__ __forceinline__ Pieces(const ConvParams& p, int height, int thread) {
    const int octets = 2 * p.steps, step = kThreads / octets, first = thread / octets;
    octet = thread % octets;
    halo_w = p.halo_w;
    rows = height * p.row_pitch + p.halo_more;
    y = first / halo_w;
    x = first % halo_w;
    step_y = step / halo_w;
    step_x = step % halo_w;
  }
  __device__ __forceinline__ bool more() const {
    return y < rows;
  }
  __device__ __forceinline__ void next() {
    y += step_y;
    x += step_x;
    if (x >= halo_w) {
      x -= halo_w;
      ++y;
    }
  }
};

template <typename T, int kThreads>
struct HaloLoader {
  const ConvParams& p;
  const Chunk& chunk;
  const T* data;  // of the image and the chunk's channels
  std::int64_t row;
  int pixel, plane, height;
  int y0, x0;  // first halo position, in steps of the input

  __device__ __forceinline__ HaloLoader(const ConvParams& p, const Chunk& chunk, const TilePlace& tile, int height)
      : p(p), chunk(chunk), height(height) {
    const Map& m = p.source[chunk.source];
    data = reinterpret_cast<const T*>(m.data) + tile.n * m.image + chunk.channel;
    row = m.row;
    pixel = m.pixel;
    plane = plane_bytes(height * p.row_pitch + p.halo_more, p.halo_w);
    y0 = tile.y * p.row_pitch + p.halo_y;
    x0 = tile.x + p.halo_x;
  }

  __device__ __forceinline__ bool inside(int y, int x) const {
    return y >= 0 && y < p.in_h && x >= 0 && x < p.in_w;
  }

  __device__ __forceinline__ void load(unsigned char* halo, int thread) const {
    for (Pieces<kThreads> i(p, height, thread); i.more(); i.next()) {
      const int y = (y0 + i.y) * p.step_in + chunk.py, x = (x0 + i.x) * p.step_in + chunk.px;
      void* to = halo + i.octet * plane + (i.y * p.halo_w + i.x) * 16;
      const int valid = chunk.valid - i.octet * 8;
      if (p.vector_in) {
        const bool real = inside(y, x) && valid > 0;
        copy_async(to, real ? data + y * row + static_cast<std::int64_t>(x) * pixel + i.octet * 8 : data, real);
      } else {
        Octet<T> v;
#pragma unroll
        for (int e = 0; e < 8; ++e) v.v[e] = from_float<T>(0.0f);
        if (inside(y, x)) {
          const T* from = data + y * row + static_cast<std::int64_t>(x) * pixel + i.octet * 8;
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            if (e < valid) v.v[e] = from[e];
          }
        }
        store_shared(to, *reinterpret_cast<const uint4*>(&v));
      }
    }
  }

  // x * pre_scale + pre_shift, then ReLU, on what this very thread has loaded. Positions outside the image stay zero.
  __device__ __forceinline__ void prologue(unsigned char* halo, int thread) const {
    const T* scale = reinterpret_cast<const T*>(p.packed.data) + static_cast<std::int64_t>(p.tiles) * p.rows * 16 +
                     2 * p.blocks * p.rows + chunk.k;
    const T* shift = scale + p.pre_count;
    for (Pieces<kThreads> i(p, height, thread); i.more(); i.next()) {
      const int y = (y0 + i.y) * p.step_in + chunk.py, x = (x0 + i.x) * p.step_in + chunk.px;
      if (!inside(y, x)) continue;
      void* at = halo + i.octet * plane + (i.y * p.halo_w + i.x) * 16;
      Octet<T> v = *static_cast<const Octet<T>*>(at);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int channel = i.octet * 8 + e;
        if (channel >= chunk.valid) continue;
        float f = to_float(v.v[e]) * to_float(scale[channel]) + to_float(shift[channel]);
        if (p.pre_relu) f = f < 0.0f ? 0.0f : f;  // keeps NaN
        v.v[e] = from_float<T>(f);
      }
      store_shared(at, *reinterpret_cast<const uint4*>(&v));
    }
  }
};

// Copies `tiles` weight tiles of kRows x 16, contiguous in both places.
template <typename T, int kRows, int kThreads>
__device__ __forceinline__ void load_weights(const ConvParams& p, unsigned char* to, int first, int tiles, int thread) {
  const auto* from =
      reinterpret_cast<const unsigned char*>(p.packed.data) + static_cast<std::int64_t>(first) * kRows * 32;
  for (int i = thread * 16; i < tiles * kRows * 32; i += kThreads * 16) copy_async(to + i, from + i, true);
}

}  // namespace fastsr::cuda
