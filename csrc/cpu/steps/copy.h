// Copies between layouts and types, and the scaling of channels.
#pragma once

#include "cpu/simd.h"
#include "cpu/steps/steps.h"

namespace fastsr::cpu {
namespace {

FASTSR_INLINE float read(std::int64_t data, std::int64_t element, int type) {
  if (type == kFloat) return reinterpret_cast<const float*>(data)[element];
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(reinterpret_cast<const bf16*>(data)[element] << 16)));
}

FASTSR_INLINE void write(std::int64_t data, std::int64_t element, int type, float value) {
  if (type == kFloat) {
    reinterpret_cast<float*>(data)[element] = value;
  } else {
    store(reinterpret_cast<bf16*>(data) + element, all(value), first(1));
  }
}

static std::int64_t copy_tasks(const Copy& c) { return c.n * c.height; }
static std::int64_t copy_scratch(const Copy&) { return 0; }
static void copy_run(const Copy& c, std::int64_t task, void*) {
  const std::int64_t n = task / c.height, y = task % c.height;
  for (std::int64_t k = 0; k < c.channels; ++k) {
    for (std::int64_t x = 0; x < c.width; ++x) {
      const std::int64_t from = n * c.from.image + k * c.from.channel + y * c.from.row + x * c.from.pixel;
      const std::int64_t to = n * c.to.image + k * c.to.channel + y * c.to.row + x * c.to.pixel;
      write(c.to.data, to, c.to.type, read(c.from.data, from, c.from.type));
    }
  }
}

constexpr StepKernel<Copy> kCopy = {copy_tasks, copy_scratch, copy_run};

}  // namespace
}  // namespace fastsr::cpu
