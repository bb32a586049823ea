// Step 3: sums M[position][tile][output] to stored pixels.
#pragma once

#include "cpu/conv/winograd_inputs.h"

namespace fastsr::cpu {
namespace {
namespace winograd {

constexpr int kGroup = 6;  // tiles of a register block, and of a partial sum

// The part of a block of outputs that goes to one plane of the output.
struct Part {
  Emit emit;
  int block, lane, lanes, channel;
  std::int64_t rows, columns;     // of the phase
  std::int64_t shift_y, shift_x;  // the tile's first output lies so far above (left of) tile * M
  float sums[kLanes];             // of what was stored
};

// Stores past the caches need whole lines.
static inline bool can_stream(const Emit& e) {
  return e.common && e.out.type == kFloat && e.out.data % 64 == 0 && e.out.row % kLanes == 0 && e.out.pixel % kLanes == 0;
}

// Makes the parts of a panel for one image; returns their number, at most sixteen a block.
template <class Tile>
static int make_parts(const Conv& c, const Layer& l, const Packed& packed, std::int64_t n, const Panel& panel,
                      Part* parts) {
  const Shape& s = c.shape;
  const int end = (panel.block + panel.blocks) * kBlock;
  const bool large = c.n * c.out.image * width_of(c.out.type) > kStreamedBytes;
  int count = 0;
  for (int at = panel.block * kBlock; at < end;) {
    const Output o = output_channel(s, l, at);
    if (o.of < 0) {
      ++at;
      continue;
    }
    Part& part = parts[count++];
    part.block = at / kBlock - panel.block;
    part.lane = at % kBlock;
    part.lanes = static_cast<int>(min_of(kBlock - part.lane, l.width - o.channel));
    part.channel = o.channel;
    part.rows = ceil_div(max_of(c.out_height - o.phase_y, 0), l.phases);
    part.columns = ceil_div(max_of(c.out_width - o.phase_x, 0), l.phases);
    part.shift_y = first_input(s, Tile::kTaps, 0, o.phase_y) - l.origin;
    part.shift_x = first_input(s, Tile::kTaps, 0, o.phase_x) - l.origin;
    const Target t = {o.channel, part.lanes, l.phases * s.shuffle, o.phase_y * s.shuffle + o.shuffle / s.shuffle,
                      o.phase_x * s.shuffle + o.shuffle % s.shuffle};
    part.emit = make_emit(c, n, t, packed.bias + at, packed.slope + at);
    part.emit.streamed = large && can_stream(part.emit);
    if (c.scale.data != 0 && s.shuffle > 1) {  // its channels are those of the convolution, not of the plane
      alignas(64) float scale[kLanes] = {};
      const float* values = reinterpret_cast<const float*>(c.scale.data) + n * c.scale.image;
      for (int i = 0; i < part.lanes; ++i) scale[i] = c.gain * values[output_channel(s, l, at + i).of];
      part.emit.scale = load(scale);
    }
    at += part.lanes;
  }
  return count;
}

// Out m Out^T of one tile and sixteen outputs.
template <class Tile>
FASTSR_INLINE void transform_products(const float* m, std::int64_t position,
                                      Vec (&y)[Tile::kOutputs][Tile::kOutputs]) {
  constexpr int kSize = Tile::kSize, kOutputs = Tile::kOutputs;
  Vec half[kOutputs][kSize];
  FASTSR_UNROLL for (int j = 0; j < kSize; ++j) {
    Vec d[kSize], o[kOutputs];
    FASTSR_UNROLL for (int i = 0; i < kSize; ++i) d[i] = load(m + (i * kSize + j) * position);
    Tile::output(d, o);
    FASTSR_UNROLL for (int i = 0; i < kOutputs; ++i) half[i][j] = o[i];
  }
  FASTSR_UNROLL for (int i = 0; i < kOutputs; ++i) Tile::output(half[i], y[i]);
}

template <class Tile, bool kSums>
FASTSR_NOINLINE void store_tile(Part& part, const Vec (&v)[Tile::kOutputs][Tile::kOutputs], std::int64_t tile_y,
                              std::int64_t tile_x) {
  constexpr int kOutputs = Tile::kOutputs;
  const std::int64_t y = tile_y * kOutputs - part.shift_y, x = tile_x * kOutputs - part.shift_x;
  const int top = static_cast<int>(max_of(0, -y)), bottom = static_cast<int>(min_of(kOutputs, part.rows - y));
  const int left = static_cast<int>(max_of(0, -x)), right = static_cast<int>(min_of(kOutputs, part.columns - x));
  Vec sums = kSums ? load(part.sums) : zero();
  if (part.lane == 0 && left == 0 && right == kOutputs) {
    emit_rows<kOutputs, kSums>(part.emit, y + top, x, bottom - top, v[top], sums);
  } else {
    for (int i = top; i < bottom; ++i) {
      for (int j = left; j < right; ++j) {
        const Vec lanes[1] = {part.lane == 0 ? v[i][j] : from_lane(v[i][j], part.lane)};
        emit<1, kSums>(part.emit, y + i, x + j, 1, lanes, sums);
      }
    }
  }
  if (kSums) store(part.sums, sums);
}

// Adds the sums of a group of tiles to its row of partial sums. Several parts may go to the same channels.
static inline void add_sums(const Conv& c, std::int64_t n, std::int64_t group, Part* parts, int count) {
  float* row = reinterpret_cast<float*>(c.partial.data) + n * c.partial.image + group * c.partial.row;
  for (int i = 0; i < count; ++i) {
    const Mask m = first(parts[i].lanes);
    float* to = row + parts[i].channel;
    store(to, add(load(to, m), load(parts[i].sums)), m);
    store(parts[i].sums, zero());
  }
}

// tiles.first is the first of a group.
template <class Tile, bool kSums>
static void store_tiles(const Conv& c, std::int64_t n, const Tiles& tiles, const float* m, std::int64_t pitch,
                        std::int64_t position, Part* parts, int count) {
  std::int64_t tile_y = tiles.first / tiles.across, tile_x = tiles.first % tiles.across;
  for (std::int64_t t = 0; t < tiles.count; ++t) {
    for (int i = 0; i < count;) {
      const int block = parts[i].block;
      Vec y[Tile::kOutputs][Tile::kOutputs];
      transform_products<Tile>(m + t * pitch + block * kLanes, position, y);
      for (; i < count && parts[i].block == block; ++i) store_tile<Tile, kSums>(parts[i], y, tile_y, tile_x);
    }
    if (kSums && ((t + 1) % kGroup == 0 || t + 1 == tiles.count)) {
      add_sums(c, n, (tiles.first + t) / kGroup, parts, count);
    }
    if (++tile_x == tiles.across) {
      tile_x = 0;
      ++tile_y;
    }
  }
}

// Lists what store_tiles will touch of a map beside M: `bytes` of every pixel that the part has in these tiles.
template <class Tile>
static void expect_pixels(const Tiles& tiles, const Part& part, const Emit::Place& place, std::int64_t bytes,
                          Ahead& ahead) {
  const std::int64_t element = width_of(place.type), end = tiles.first + tiles.count;
  for (std::int64_t at = tiles.first; at < end;) {  // a row of tiles
    const std::int64_t tile_y = at / tiles.across, tile_x = at % tiles.across;
    const std::int64_t length = min_of(tiles.across - tile_x, end - at);
    const std::int64_t y = tile_y * Tile::kOutputs - part.shift_y, x = tile_x * Tile::kOutputs - part.shift_x;
    const std::int64_t bottom = min_of(y + Tile::kOutputs, part.rows);
    const std::int64_t left = max_of(x, 0), right = min_of(x + length * Tile::kOutputs, part.columns);
    for (std::int64_t row = max_of(y, 0); row < bottom; ++row) {
      ahead.add(reinterpret_cast<const char*>(place.data) + (row * place.row + left * place.pixel) * element, bytes,
                right - left, place.pixel * element);
    }
    at += length;
  }
}

template <class Tile>
static void expect_outputs(const Tiles& tiles, const Part* parts, int count, Ahead& ahead) {
  constexpr std::int64_t kLine = Ahead::kLine;
  const Part* listed = nullptr;  // the last one; what lies between its pixels is fetched with them
  for (int i = 0; i < count;) {
    const Part& part = parts[i];
    const Emit& e = part.emit;
    int lanes = part.lanes;  // neighbouring parts of one plane are neighbours in memory
    while (++i < count && parts[i].channel == part.channel + lanes && parts[i].emit.out.data > e.out.data) {
      lanes += parts[i].lanes;
    }
    const std::int64_t out_stride = e.out.pixel * width_of(e.out.type), out_bytes = lanes * width_of(e.out.type);
    if (out_bytes < kLine && listed != nullptr && e.out.data - listed->emit.out.data < out_stride) continue;
    listed = &part;
    const Emit::Place none = {0, 0, 0, kFloat};
    const Emit::Place places[] = {e.streamed ? none : e.out, e.skip[0], e.skip[1], e.factor, e.term, e.outer};
    for (const Emit::Place& place : places) {
      if (place.data == 0) continue;
      const std::int64_t bytes = lanes * width_of(place.type), stride = place.pixel * width_of(place.type);
      expect_pixels<Tile>(tiles, part, place, bytes < kLine && stride <= 4 * kLine ? stride : bytes, ahead);
    }
  }
}

}  // namespace winograd
}  // namespace
}  // namespace fastsr::cpu
