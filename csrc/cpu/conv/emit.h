// The epilogue of every algorithm: what happens to the sums of a convolution until they are stored.
//
// An algorithm makes sixteen output channels of a few neighbouring pixels of one row and hands them to `emit`. Which
// sixteen, and where in the shuffled or phased output they go, an `Emit` knows; it is made once per task, image and
// block of outputs.
#pragma once

#include "cpu/conv/conv.h"
#include "cpu/simd.h"

namespace fastsr::cpu {
namespace {

// Where a block of sixteen outputs goes. The pixel (y, x) of the algorithm's grid is the pixel
// (y * step + phase_y, x * step + phase_x) of Conv::out; outputs channel .. channel + lanes - 1 of it are stored.
struct Target {
  int channel, lanes;
  int step, phase_y, phase_x;
};

struct Emit {
  Vec bias, slope, scale;
  float skip_gain, outer_gain;
  int act, post_relu;
  Mask mask;
  bool whole;   // all sixteen lanes
  bool simple;  // nothing but bias, activation and scale
  bool scaled;
  bool common;  // a case that emit_rows has code of its own for
  bool streamed;  // stores go past the caches
  int lanes;
  // Addresses of pixel (0, 0) of the grid, first channel of the block; 0: none. Strides in elements.
  struct Place {
    std::int64_t data, row, pixel;
    int type;
  } out, factor, term, outer, skip[2];
  int skip_lanes;  // lanes of the block that the first of two skips holds; the others come from the second
};

FASTSR_INLINE std::int64_t width_of(int type) { return type == kFloat ? 4 : 2; }

FASTSR_INLINE Emit::Place place(const Map& m, std::int64_t n, int channel, const Target& t) {
  if (m.data == 0) return {0, 0, 0, kFloat};
  const std::int64_t first = n * m.image + t.phase_y * m.row + t.phase_x * m.pixel + channel;
  return {m.data + first * width_of(m.type), m.row * t.step, m.pixel * t.step, m.type};
}

// bias, slope: sixteen values each for this block, from the packed weights.
static inline Emit make_emit(const Conv& c, std::int64_t n, const Target& t, const float* bias, const float* slope) {
  Emit e;
  e.bias = load(bias);
  e.slope = load(slope);
  e.lanes = t.lanes;
  e.mask = first(t.lanes);
  e.whole = t.lanes == kLanes;
  e.act = c.act;
  e.post_relu = c.post_relu;
  e.skip_gain = c.skip_gain;
  e.outer_gain = c.outer_gain;
  e.scaled = c.gain != 1.0f || c.scale.data != 0;
  e.scale = all(c.gain);
  if (c.scale.data != 0) {
    const float* scale = reinterpret_cast<const float*>(c.scale.data) + n * c.scale.image + t.channel;
    e.scale = mul(e.scale, load(scale, e.mask));
  }
  e.out = place(c.out, n, t.channel, t);
  e.factor = place(c.factor, n, t.channel, t);
  e.term = place(c.term, n, t.channel, t);
  e.outer = place(c.outer, n, t.channel, t);
  e.skip[0] = e.skip[1] = {0, 0, 0, kFloat};
  e.skip_lanes = kLanes;
  if (c.skips > 0) {
    const int held = c.skip[0].channels - t.channel;  // of this block's channels, those of the first skip
    if (held > 0) e.skip[0] = place(c.skip[0], n, t.channel, t);
    if (c.skips > 1 && held < t.lanes) e.skip[1] = place(c.skip[1], n, held > 0 ? 0 : -held, t);
    e.skip_lanes = held < 0 ? 0 : held > kLanes ? kLanes : held;
  }
  e.simple = c.skips == 0 && c.factor.data == 0 && c.outer.data == 0 && !c.post_relu;
  e.common = e.whole && c.factor.data == 0 && c.outer.data == 0 && e.skip[1].data == 0 &&
             (c.skips == 0 ? e.simple && !e.scaled : e.skip_lanes == kLanes);
  e.streamed = false;
  return e;
}

FASTSR_INLINE Vec load_any(std::int64_t data, std::int64_t element, int type, Mask m) {
  return type == kFloat ? load(reinterpret_cast<const float*>(data) + element, m)
                        : load(reinterpret_cast<const bf16*>(data) + element, m);
}

// The skip of a block that lies in both parts, or in the second alone.
static inline Vec load_parted(const Emit& e, std::int64_t y, std::int64_t x) {
  alignas(64) float lanes[2 * kLanes];
  store(lanes, zero());
  if (e.skip_lanes > 0) {
    store(lanes, load_any(e.skip[0].data, y * e.skip[0].row + x * e.skip[0].pixel, e.skip[0].type, first(e.skip_lanes)));
  }
  const int rest = e.lanes - e.skip_lanes;
  const std::int64_t at = y * e.skip[1].row + x * e.skip[1].pixel;
  store(lanes + e.skip_lanes, load_any(e.skip[1].data, at, e.skip[1].type, first(rest)));
  return load(lanes);
}

FASTSR_INLINE Vec activate(const Emit& e, Vec v) {
  if (e.act == kRelu) return positive(v);
  if (e.act == kLeaky) return fma(e.slope, negative(v), positive(v));
  return v;
}

FASTSR_INLINE Vec finish(const Emit& e, Vec v, std::int64_t y, std::int64_t x) {
  v = activate(e, add(v, e.bias));
  if (e.scaled) v = mul(v, e.scale);
  if (e.simple) return v;
  if (e.skip[1].data != 0) {
    v = fma(all(e.skip_gain), load_parted(e, y, x), v);
  } else if (e.skip[0].data != 0) {
    v = fma(all(e.skip_gain), load_any(e.skip[0].data, y * e.skip[0].row + x * e.skip[0].pixel, e.skip[0].type, e.mask), v);
  }
  if (e.factor.data != 0) {
    const Vec f = load_any(e.factor.data, y * e.factor.row + x * e.factor.pixel, e.factor.type, e.mask);
    v = fma(v, f, load_any(e.term.data, y * e.term.row + x * e.term.pixel, e.term.type, e.mask));
  }
  if (e.post_relu) v = positive(v);
  if (e.outer.data != 0) {
    const Vec o = load_any(e.outer.data, y * e.outer.row + x * e.outer.pixel, e.outer.type, e.mask);
    v = fma(all(e.outer_gain), v, o);
  }
  return v;
}

FASTSR_INLINE void put(const Emit& e, Vec v, std::int64_t y, std::int64_t x) {
  const std::int64_t at = y * e.out.row + x * e.out.pixel;
  if (e.out.type == kFloat) {
    float* p = reinterpret_cast<float*>(e.out.data) + at;
    e.whole ? store(p, v) : store(p, v, e.mask);
  } else {
    bf16* p = reinterpret_cast<bf16*>(e.out.data) + at;
    e.whole ? store(p, v) : store(p, v, e.mask);
  }
}

// Finishes and stores `valid` pixels (y, x), (y, x + 1), ...; adds what was stored to `sums` where that is wanted.
template <int kCount, bool kSums>
FASTSR_INLINE void emit(const Emit& e, std::int64_t y, std::int64_t x, int valid, const Vec (&v)[kCount], Vec& sums) {
  FASTSR_UNROLL for (int i = 0; i < kCount; ++i) {
    if (i < valid) {
      const Vec done = finish(e, v[i], y, x + i);
      put(e, done, y, x + i);
      if constexpr (kSums) sums = add(sums, done);
    }
  }
}

// What a common case is made of, known at compile time. Without activation, and for ReLU, values are clamped from below.
template <bool kLeakyAct, typename SkipType, typename OutType, bool kStream>
struct Case {
  static constexpr bool kIsLeaky = kLeakyAct, kStreamed = kStream;
  using Skip = SkipType;  // void: none
  using Out = OutType;
};

template <class Kind, int kColumns, bool kSums>
static inline void emit_case(const Emit& e, std::int64_t y, std::int64_t x, int rows, const Vec* v, Vec& sums) {
  using Skip = typename Kind::Skip;
  using Out = typename Kind::Out;
  constexpr bool kSkip = !__is_same(Skip, void);
  const Vec lowest = all(-__builtin_inff()), floor = e.act == kRelu ? zero() : lowest;
  const Vec last_floor = e.post_relu ? zero() : lowest, bias = e.bias, slope = e.slope, scale = e.scale;
  const Vec gain = all(e.skip_gain);
  for (int i = 0; i < rows; ++i, ++y, v += kColumns) {
    Out* out = reinterpret_cast<Out*>(e.out.data) + y * e.out.row + x * e.out.pixel;
    FASTSR_UNROLL for (int j = 0; j < kColumns; ++j) {
      Vec done = add(v[j], bias);
      done = Kind::kIsLeaky ? fma(slope, negative(done), positive(done)) : at_least(done, floor);
      if constexpr (kSkip) {
        const Skip* skip = reinterpret_cast<const Skip*>(e.skip[0].data) + y * e.skip[0].row + (x + j) * e.skip[0].pixel;
        done = at_least(fma(gain, load(skip), mul(done, scale)), last_floor);
      }
      if constexpr (Kind::kStreamed) {
        stream(out + j * e.out.pixel, done);
      } else {
        store(out + j * e.out.pixel, done);
      }
      if constexpr (kSums) sums = add(sums, done);
    }
  }
}

template <bool kLeakyAct, typename Skip, int kColumns, bool kSums>
FASTSR_INLINE void emit_skip(const Emit& e, std::int64_t y, std::int64_t x, int rows, const Vec* v, Vec& sums) {
  if (e.out.type == kBf16) {
    emit_case<Case<kLeakyAct, Skip, bf16, false>, kColumns, kSums>(e, y, x, rows, v, sums);
  } else if (e.streamed) {
    emit_case<Case<kLeakyAct, Skip, float, true>, kColumns, kSums>(e, y, x, rows, v, sums);
  } else {
    emit_case<Case<kLeakyAct, Skip, float, false>, kColumns, kSums>(e, y, x, rows, v, sums);
  }
}

template <bool kLeakyAct, int kColumns, bool kSums>
FASTSR_INLINE void emit_act(const Emit& e, std::int64_t y, std::int64_t x, int rows, const Vec* v, Vec& sums) {
  if (e.skip[0].data == 0) {
    emit_skip<kLeakyAct, void, kColumns, kSums>(e, y, x, rows, v, sums);
  } else if (e.skip[0].type == kFloat) {
    emit_skip<kLeakyAct, float, kColumns, kSums>(e, y, x, rows, v, sums);
  } else {
    emit_skip<kLeakyAct, bf16, kColumns, kSums>(e, y, x, rows, v, sums);
  }
}

// Finishes and stores `rows` rows of kColumns pixels from (y, x) on; v holds them one after the other. The same values as
// from `emit`, bit for bit; the common cases are faster.
template <int kColumns, bool kSums>
static inline void emit_rows(const Emit& e, std::int64_t y, std::int64_t x, int rows, const Vec* v, Vec& sums) {
  if (!e.common) {
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        const Vec one[1] = {v[i * kColumns + j]};
        emit<1, kSums>(e, y + i, x + j, 1, one, sums);
      }
    }
  } else if (e.act == kLeaky) {
    emit_act<true, kColumns, kSums>(e, y, x, rows, v, sums);
  } else {
    emit_act<false, kColumns, kSums>(e, y, x, rows, v, sums);
  }
}

}  // namespace
}  // namespace fastsr::cpu
