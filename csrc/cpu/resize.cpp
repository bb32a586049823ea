// Separable resizing: every output row is a sum of input rows, then every pixel of it a sum of that row's pixels. Bound
// by memory, so it is compiled for the baseline. Positions and weights of the taps come from fastsr/ops/resize_bicubic.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "common/check.h"

namespace fastsr::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "fastsr_cpu::resize";

struct Bf16 {
  std::uint16_t bits;
};

float widen(float x) { return x; }
float widen(Bf16 x) {
  const std::uint32_t u = static_cast<std::uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

void put(float* to, float x) { *to = x; }
// Round to nearest even; a NaN stays one.
void put(Bf16* to, float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, 4);
  to->bits = static_cast<std::uint16_t>(x != x ? (u >> 16) | 0x40 : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// Of one axis: `count` samples, each the sum of `taps` weights times what stands at positions.
struct Taps {
  std::int64_t taps, count;
  const std::int64_t* position;  // [taps, count]
  const float* weight;           // [taps, count]
};

struct Params {
  std::int64_t n, channels, height, width;           // of the input
  std::int64_t image, channel, row, pixel;           // strides of the input, in elements
  std::int64_t out_image, out_channel, out_row, out_pixel;
  std::int64_t lanes;  // channels that lie side by side and are resized together: all, or one
  Taps rows, columns;
};

// Output rows begin .. end - 1 of all images and groups of lanes.
template <typename T>
void resize_rows(const Params& p, const T* in, T* out, std::int64_t begin, std::int64_t end) {
  const std::int64_t length = p.width * p.lanes, groups = p.channels / p.lanes;
  const bool dense = p.pixel == p.lanes || p.width == 1;
  std::vector<float> sums(static_cast<std::size_t>(length));  // one row of the input's width
  for (std::int64_t task = begin; task < end; ++task) {
    const std::int64_t y = task % p.rows.count, group = task / p.rows.count % groups, n = task / p.rows.count / groups;
    for (std::int64_t k = 0; k < p.rows.taps; ++k) {
      const float w = p.rows.weight[k * p.rows.count + y];
      const T* from = in + n * p.image + group * p.channel + p.rows.position[k * p.rows.count + y] * p.row;
      float* to = sums.data();
      if (k == 0) std::memset(to, 0, sums.size() * sizeof(float));
      if (dense) {
        for (std::int64_t i = 0; i < length; ++i) to[i] += w * widen(from[i]);
      } else {
        for (std::int64_t x = 0; x < p.width; ++x) {
          for (std::int64_t c = 0; c < p.lanes; ++c) to[x * p.lanes + c] += w * widen(from[x * p.pixel + c]);
        }
      }
    }
    T* to = out + n * p.out_image + group * p.out_channel + y * p.out_row;
    for (std::int64_t x = 0; x < p.columns.count; ++x) {
      for (std::int64_t c = 0; c < p.lanes; ++c) {
        float sum = 0;
        for (std::int64_t k = 0; k < p.columns.taps; ++k) {
          const std::int64_t i = k * p.columns.count + x;
          sum += p.columns.weight[i] * sums[static_cast<std::size_t>(p.columns.position[i] * p.lanes + c)];
        }
        put(to + x * p.out_pixel + c, sum);
      }
    }
  }
}

template <typename T>
void launch(const Params& p, const Tensor& x, Tensor& out) {
  const T* in = static_cast<const T*>(x.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  const std::int64_t tasks = p.n * (p.channels / p.lanes) * p.rows.count;
  const std::int64_t work = p.lanes * (p.rows.taps * p.width + p.columns.taps * p.columns.count);
  const std::int64_t grain = work > 0 && work < 32768 ? 32768 / work : 1;
  torch::stable::parallel_for(0, tasks, grain, [&](std::int64_t begin, std::int64_t end) {
    resize_rows<T>(p, in, to, begin, end);
  });
}

// positions, weights: (taps, count), of an axis of `size` pixels; every position is checked, since it is an address.
Taps taps_of(const char* name, const Tensor& positions, const Tensor& weights, std::int64_t size, std::int64_t count) {
  const bool holds = positions.scalar_type() == ScalarType::Long && weights.scalar_type() == ScalarType::Float &&
                     positions.is_contiguous() && weights.is_contiguous() && positions.dim() == 2 &&
                     weights.dim() == 2 && positions.size(0) == weights.size(0) && positions.size(1) == count &&
                     weights.size(1) == count && positions.size(0) > 0;
  expect(holds, kOp, name, "contiguous int64 positions and float32 weights, both (taps, " + std::to_string(count) + ")",
         "others");
  Taps t{positions.size(0), count, static_cast<const std::int64_t*>(positions.const_data_ptr()),
         static_cast<const float*>(weights.const_data_ptr())};
  for (std::int64_t i = 0; i < t.taps * t.count; ++i) {
    if (t.position[i] < 0 || t.position[i] >= size) {
      fail(kOp, name, "positions from 0 to " + std::to_string(size - 1), t.position[i]);
    }
  }
  return t;
}

// out: (N, C, height, width), x: (N, C, H, W), of one type, float32 or bfloat16, with any strides.
void resize(Tensor out, Tensor x, Tensor rows, Tensor row_weights, Tensor columns, Tensor column_weights) {
  expect(x.dim() == 4 && x.numel() > 0, kOp, "x", "(N, C, H, W) with at least one element", "another shape");
  const bool alike = out.dim() == 4 && out.size(0) == x.size(0) && out.size(1) == x.size(1) && out.numel() > 0 &&
                     out.scalar_type() == x.scalar_type();
  expect(alike, kOp, "out", "(N, C, height, width) of the type of x", "another shape or type");
  Params p{};
  p.n = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
  p.image = x.stride(0), p.channel = x.stride(1), p.row = x.stride(2), p.pixel = x.stride(3);
  p.out_image = out.stride(0), p.out_channel = out.stride(1), p.out_row = out.stride(2), p.out_pixel = out.stride(3);
  p.lanes = p.channel == 1 && p.out_channel == 1 ? p.channels : 1;
  p.rows = taps_of("rows", rows, row_weights, p.height, out.size(2));
  p.columns = taps_of("columns", columns, column_weights, p.width, out.size(3));
  if (x.scalar_type() == ScalarType::Float) {
    launch<float>(p, x, out);
  } else if (x.scalar_type() == ScalarType::BFloat16) {
    launch<Bf16>(p, x, out);
  } else {
    fail(kOp, "x", "float32 or bfloat16", "another type");
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastsr_cpu, m) {
  m.def(
      "resize(Tensor(a!) out, Tensor x, Tensor rows, Tensor row_weights, Tensor columns, Tensor column_weights) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastsr_cpu, CPU, m) {
  m.impl("resize", TORCH_BOX(&resize));
}

}  // namespace
}  // namespace fastsr::cpu
