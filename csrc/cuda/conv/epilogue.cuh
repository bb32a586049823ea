// What happens to the sums of a convolution until they are stored, for eight channels of one pixel at a time.
#pragma once

#include "cuda/conv/conv.h"
#include "cuda/conv/load.cuh"
#include "cuda/device.h"

namespace fastsr::cuda {

// kFloat8: of sums of e4m3 products.
template <typename T, bool kFloat8 = false>
struct Epilogue {
  const ConvParams& p;
  OctetPlace place;
  int n;
  float bias[8], slope[8], scale[8];
  float unit[8];  // what the sums count in

  // octet: of block `block`; n: the image.
  __device__ __forceinline__ Epilogue(const ConvParams& p, int block, int octet, int n) : p(p), n(n) {
    place = tables(p).blocks[block].octets[octet];
    const T* rows = reinterpret_cast<const T*>(p.packed.data) + static_cast<std::int64_t>(p.tiles) * p.rows * 16 +
                    block * p.rows + octet * 8;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      bias[e] = p.has_bias ? to_float(rows[e]) : 0.0f;
      slope[e] = p.act == kPrelu ? to_float(rows[p.blocks * p.rows + e]) : p.slope;
      unit[e] = kFloat8 ? to_float(rows[p.blocks * p.rows + e]) * range() : 1.0f;
      scale[e] = p.gain;
      if (p.scale.data != 0 && e < place.valid) {
        const std::int64_t at = n * p.scale.image + place.channel + e;
        scale[e] *= p.scale_is_float ? reinterpret_cast<const float*>(p.scale.data)[at]
                                     : to_float(reinterpret_cast<const T*>(p.scale.data)[at]);
      }
    }
  }

  // The scale of the image's e4m3 maps.
  __device__ __forceinline__ float range() const {
    return reinterpret_cast<const float*>(p.range.data)[n];
  }

  __device__ __forceinline__ std::int64_t offset(const Map& m, int y, int x, int channel) const {
    return n * m.image + y * m.row + static_cast<std::int64_t>(x) * m.pixel + channel;
  }

  // Eight channels of a map; those beyond `valid` are zero.
  __device__ __forceinline__ void read(const Map& m, int y, int x, int channel, float (&v)[8]) const {
    const T* from = reinterpret_cast<const T*>(m.data) + offset(m, y, x, channel);
    if (p.vector_out) {
      const Octet<T> o = *reinterpret_cast<const Octet<T>*>(from);
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] = to_float(o.v[e]);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] = e < place.valid ? to_float(from[e]) : 0.0f;
    }
  }

  __device__ __forceinline__ void read_skip(int y, int x, float (&v)[8]) const {
    const int split = p.skip[1].data != 0 ? p.skip_split : 1 << 30;
    if (place.channel + place.valid <= split) {
      read(p.skip[0], y, x, place.channel, v);
    } else if (place.channel >= split) {
      read(p.skip[1], y, x, place.channel - split, v);
    } else {  // the octet lies in both
      const T* first = reinterpret_cast<const T*>(p.skip[0].data) + offset(p.skip[0], y, x, 0);
      const T* second = reinterpret_cast<const T*>(p.skip[1].data) + offset(p.skip[1], y, x, 0);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int c = place.channel + e;
        v[e] = e >= place.valid ? 0.0f : to_float(c < split ? first[c] : second[c - split]);
      }
    }
  }

  // Finishes the sums `v` of the grid position (grid_y, grid_x), stores them, and adds what was stored to `sums`.
  __device__ __forceinline__ void finish(int grid_y, int grid_x, float (&v)[8], float (&sums)[8]) const {
    const int y = (grid_y * p.row_pitch + place.row) * p.step_out + place.py, x = grid_x * p.step_out + place.px;
    if (place.valid == 0 || grid_y >= p.grid_h || y >= p.out_h || x >= p.out_w) return;
    float other[8], term[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float z = kFloat8 ? v[e] * unit[e] + bias[e] : v[e] + bias[e];
      const float below = p.act == kRelu ? 0.0f : z * slope[e];
      v[e] = (z < 0.0f ? below : z) * scale[e];  // a NaN is not below zero, so it stays
    }
    if (p.skip[0].data != 0) {
      read_skip(y, x, other);
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] += p.skip_gain * other[e];
    }
    if (p.factor.data != 0) {
      read(p.factor, y, x, place.channel, other);
      read(p.term, y, x, place.channel, term);
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] = v[e] * other[e] + term[e];
    }
    if (p.post_relu) {
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] = v[e] < 0.0f ? 0.0f : v[e];
    }
    if (p.outer.data != 0) {
      read(p.outer, y, x, place.channel, other);
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] = other[e] + p.outer_gain * v[e];
    }
    if constexpr (kFloat8) {
      if (p.float8_out) {
        Float8Octet o;
        o.set(v, 1.0f / range());
        *reinterpret_cast<Float8Octet*>(p.out.data + offset(p.out, y, x, place.channel)) = o;
        return;
      }
    }
    Octet<T> o;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      o.v[e] = from_float<T>(v[e]);
      sums[e] += to_float(o.v[e]);
    }
    T* to = reinterpret_cast<T*>(p.out.data) + offset(p.out, y, x, place.channel);
    if (p.vector_out) {
      *reinterpret_cast<Octet<T>*>(to) = o;
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (e < place.valid) to[e] = o.v[e];
      }
    }
  }

  __device__ __forceinline__ void write_partial(int tile, int tiles, int e, float sum) const {
    if (e < place.valid) {
      const std::int64_t at = (static_cast<std::int64_t>(n) * tiles + tile) * p.channels + place.channel + e;
      reinterpret_cast<float*>(p.partial.data)[at] = sum;
    }
  }
};

}  // namespace fastsr::cuda
