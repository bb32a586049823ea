// Step 1: windows of the input to V[position][tile][input].
#pragma once

#include "cpu/conv/ahead.h"
#include "cpu/conv/winograd_layer.h"

namespace fastsr::cpu {
namespace {
namespace winograd {

constexpr int kMostSize = 8;  // of a window

// Neighbouring tiles of an image, in the order of rows.
struct Tiles {
  std::int64_t first, count, across;  // `across` of them make a row
};

// A source's pixels in one plane of the input, and what of it there is in a range of K.
struct View {
  std::int64_t data;  // address of the plane's pixel (0, 0)
  std::int64_t row, pixel, height, width;
  std::int64_t origin_y, origin_x;  // of the window of tile (0, 0)
  int element;                      // bytes
  int begin, end;                   // in K, multiples of sixteen
  int plane, source;                // where the plane, and the source in it, begin in K
  int channels;                     // of the source
};

// Calls act(view) for every source and plane that there is in begin .. end - 1 of K.
template <typename Act>
FASTSR_INLINE void each_view(const Conv& c, const Layer& l, int taps, std::int64_t n, int begin, int end, Act act) {
  const Shape& s = c.shape;
  const std::int64_t step = s.transposed ? 1 : s.stride;
  for (int plane = begin / l.plane_inputs; plane * l.plane_inputs < end; ++plane) {
    const int plane_y = plane / l.planes, plane_x = plane % l.planes;
    const std::int64_t y = step > 1 ? plane_y : 0, x = step > 1 ? plane_x : 0;
    int at = plane * l.plane_inputs;
    for (int i = 0; i < s.sources; ++i) {
      const Map& map = c.in[i];
      View v;
      v.plane = plane * l.plane_inputs;
      v.source = at;
      v.begin = at > begin ? at : begin;
      at += static_cast<int>(round_up(s.widths[i], kBlock));
      v.end = at < end ? at : end;
      if (v.begin >= v.end) continue;
      v.element = static_cast<int>(width_of(map.type));
      v.data = map.data + (n * map.image + y * map.row + x * map.pixel) * v.element;
      v.row = map.row * step;
      v.pixel = map.pixel * step;
      v.height = ceil_div(max_of(c.height - y, 0), step);
      v.width = ceil_div(max_of(c.width - x, 0), step);
      v.origin_y = l.phases > 1 ? l.origin : first_input(s, taps, plane_y, 0);
      v.origin_x = l.phases > 1 ? l.origin : first_input(s, taps, plane_x, 0);
      v.channels = s.widths[i];
      act(v);
    }
  }
}

// In d In^T, sixteen channels at once. d(i, j) loads them of pixel (i, j) of the window.
template <class Tile, typename T, typename Load>
FASTSR_INLINE void transform_loaded(Load d, T* v, std::int64_t position) {
  constexpr int kSize = Tile::kSize;
  Vec half[kSize][kSize];
  FASTSR_UNROLL for (int j = 0; j < kSize; ++j) {
    Vec column[kSize], o[kSize];
    FASTSR_UNROLL for (int i = 0; i < kSize; ++i) column[i] = d(i, j);
    Tile::input(column, o);
    FASTSR_UNROLL for (int i = 0; i < kSize; ++i) half[i][j] = o[i];
  }
  FASTSR_UNROLL for (int i = 0; i < kSize; ++i) {
    Vec o[kSize];
    Tile::input(half[i], o);
    FASTSR_UNROLL for (int j = 0; j < kSize; ++j) store(v + (i * kSize + j) * position, o[j]);
  }
}

// A window inside the image: pixels `row` and `pixel` elements apart.
template <class Tile, typename From, typename T>
FASTSR_NOINLINE void transform_window(const From* x, std::int64_t row, std::int64_t pixel, T* v, std::int64_t position) {
  auto d = [&](int i, int j) __attribute__((always_inline)) { return load(x + i * row + j * pixel); };
  transform_loaded<Tile>(d, v, position);
}

// Any window: where each pixel's first channel lies (outside the image, in a row of zeros), how many lanes are left of
// it, and the prologue x * scale + shift, at least `floor`.
struct Window {
  const char* pixels[kMostSize][kMostSize];
  Mask masks[kMostSize][kMostSize];
  const float *scale, *shift;
  Vec floor;
};

FASTSR_INLINE void find_pixels(const View& view, std::int64_t y, std::int64_t x, int size, const char* zeros,
                               Window& to) {
  const char* data = reinterpret_cast<const char*>(view.data);
  for (int i = 0; i < size; ++i) {
    const bool row = y + i >= 0 && y + i < view.height;
    for (int j = 0; j < size; ++j) {
      const bool there = row && x + j >= 0 && x + j < view.width;
      to.pixels[i][j] = there ? data + ((y + i) * view.row + (x + j) * view.pixel) * view.element : zeros;
    }
  }
}

FASTSR_INLINE void set_masks(Window& w, int lanes, int size, const char* zeros) {
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j) w.masks[i][j] = first(w.pixels[i][j] == zeros ? 0 : lanes);
  }
}

// A window at the edge of the image, sixteen channels from byte `channel` of its pixels on.
template <class Tile, typename From, typename T>
FASTSR_NOINLINE void transform_edge(const Window& w, std::int64_t channel, T* v, std::int64_t position) {
  auto d = [&](int i, int j)
      __attribute__((always_inline)) { return load(reinterpret_cast<const From*>(w.pixels[i][j] + channel)); };
  transform_loaded<Tile>(d, v, position);
}

// A window with a prologue or with less than sixteen channels. What is masked is zero after the prologue.
template <class Tile, typename From, typename T>
FASTSR_NOINLINE void transform_masked(const Window& w, std::int64_t channel, T* v, std::int64_t position) {
  const Vec scale = load(w.scale), floor = w.floor;
  const float* shift = w.shift;
  auto d = [&](int i, int j) __attribute__((always_inline)) {
    const Mask m = w.masks[i][j];
    const Vec x = load(reinterpret_cast<const From*>(w.pixels[i][j] + channel), m);
    return at_least(fma(x, scale, load(shift, m)), floor);
  };
  transform_loaded<Tile>(d, v, position);
}

// V of one source's windows, from its first input on: a tile every `pitch` elements.
template <class Tile, typename From, typename T>
static void transform_view(const Shape& s, const Packed& p, const View& view, const Tiles& tiles, const char* zeros,
                           T* v, std::int64_t pitch, std::int64_t position) {
  constexpr int kSize = Tile::kSize;
  const bool prologue = s.has_pre || s.pre_relu;
  alignas(64) float none[kLanes], ones[kLanes];
  store(none, zero());
  store(ones, all(1.0f));
  Window w;
  w.scale = ones;
  w.shift = none;
  w.floor = s.pre_relu ? zero() : all(-__builtin_inff());
  const int last = view.source + view.channels - kLanes;  // of K, where sixteen channels are left
  std::int64_t tile_y = tiles.first / tiles.across, tile_x = tiles.first % tiles.across;
  for (std::int64_t t = 0; t < tiles.count; ++t, v += pitch) {
    const std::int64_t y = tile_y * Tile::kOutputs + view.origin_y, x = tile_x * Tile::kOutputs + view.origin_x;
    const bool inside = y >= 0 && x >= 0 && y + kSize <= view.height && x + kSize <= view.width;
    const From* corner = reinterpret_cast<const From*>(view.data) + y * view.row + x * view.pixel - view.source;
    if (!inside || prologue) find_pixels(view, y, x, kSize, zeros, w);
    for (int k = view.begin; k < view.end; k += kLanes) {
      T* to = v + (k - view.begin);
      const std::int64_t channel = (k - view.source) * sizeof(From);
      if (prologue || k > last) {
        if (inside && !prologue) find_pixels(view, y, x, kSize, zeros, w);
        if (s.has_pre) {
          w.scale = p.pre_scale + k - view.plane;
          w.shift = p.pre_shift + k - view.plane;
        }
        set_masks(w, k > last ? view.source + view.channels - k : kLanes, kSize, zeros);
        transform_masked<Tile, From>(w, channel, to, position);
      } else if (inside) {
        transform_window<Tile>(corner + k, view.row, view.pixel, to, position);
      } else {
        transform_edge<Tile, From>(w, channel, to, position);
      }
    }
    if (++tile_x == tiles.across) {
      tile_x = 0;
      ++tile_y;
    }
  }
}

// V of inputs begin .. end - 1 of K, multiples of sixteen.
template <class Tile, typename T>
static void transform_inputs(const Conv& c, const Layer& l, const Packed& p, std::int64_t n, const Tiles& tiles,
                             int begin, int end, const char* zeros, T* v, std::int64_t pitch, std::int64_t position) {
  each_view(c, l, Tile::kTaps, n, begin, end, [&](const View& view) {
    T* to = v + (view.begin - begin);
    if (view.element == 4) {
      transform_view<Tile, float>(c.shape, p, view, tiles, zeros, to, pitch, position);
    } else {
      transform_view<Tile, bf16>(c.shape, p, view, tiles, zeros, to, pitch, position);
    }
  });
}

// Lists what transform_inputs will read.
template <class Tile>
static void expect_inputs(const Conv& c, const Layer& l, std::int64_t n, const Tiles& tiles, int begin, int end,
                          Ahead& ahead) {
  each_view(c, l, Tile::kTaps, n, begin, end, [&](const View& view) {
    std::int64_t at = tiles.first;
    const std::int64_t behind = tiles.first + tiles.count;
    while (at < behind) {  // a row of tiles
      const std::int64_t tile_y = at / tiles.across, tile_x = at % tiles.across;
      const std::int64_t length = min_of(tiles.across - tile_x, behind - at);
      const std::int64_t y = tile_y * Tile::kOutputs + view.origin_y, x = tile_x * Tile::kOutputs + view.origin_x;
      const std::int64_t bottom = min_of(y + Tile::kSize, view.height);
      const std::int64_t left = max_of(x, 0), right = min_of(x + (length - 1) * Tile::kOutputs + Tile::kSize, view.width);
      for (std::int64_t i = max_of(y, 0); i < bottom; ++i) {
        const std::int64_t element = i * view.row + left * view.pixel + view.begin - view.source;
        ahead.add(reinterpret_cast<const char*>(view.data) + element * view.element,
                  static_cast<std::int64_t>(view.end - view.begin) * view.element, right - left,
                  view.pixel * view.element);
      }
      at += length;
    }
  });
}

}  // namespace winograd
}  // namespace
}  // namespace fastsr::cpu
