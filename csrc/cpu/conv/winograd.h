// Winograd convolution: transform windows of the input, multiply position by position, transform back and store.
//
// A task is T tiles of one image, in the order of rows:
//
//   1. In d In^T of every window, sixteen channels at once, to V[position][tile][input]. A window inside the image is read
//      where it lies; one at an edge is copied first, with zeros around the image.
//   2. For every position M = V U, a T x K by K x 64 product.
//   3. Out m Out^T of every tile and the whole epilogue, to the M x M pixels that are inside the image.
//
// V, M and the weights U in use stay in the second-level cache, which bounds T. Positions of V and M are a cache line
// further apart than they need to be: as powers of two they would all fall in the same few sets of the first level.
#pragma once

#include "cpu/conv/products.h"
#include "cpu/conv/winograd_layer.h"

namespace fastsr::cpu {
namespace {
namespace winograd {

constexpr int kGroup = 6;                        // tiles of a register block, and of a partial sum
constexpr std::int64_t kCacheBytes = 640 << 10;  // of V and M
constexpr int kTasksAThread = 4;

static inline const char* refuse_taps(const Shape& s, int taps) {
#if !defined(__AVX512BF16__)
  if (s.bf16_products) return "products of bfloat16 need AVX-512 BF16";
#endif
  if (s.kernel < 2 || s.kernel > 64) return "kernel is outside 2..64";
  if (s.stride < 1 || s.stride > kMostPhases) return "stride is outside 1..16";
  if (s.upsample < 1 || s.upsample > kMostPhases) return "upsample is outside 1..16";
  if (s.padding < 0 || s.padding > 1024) return "padding is outside 0..1024";
  if (s.upsample > 1 && (s.transposed || s.stride > 1)) return "upsample goes with stride 1";
  if (s.groups > 1 && (s.transposed || s.stride > 1)) return "groups go with stride 1";
  int needed = s.kernel < taps ? s.kernel : taps;
  if (s.transposed || s.stride > 1) {
    needed = static_cast<int>(ceil_div(s.kernel, s.stride));
  } else if (s.upsample > 1) {
    needed = 0;
    for (int phase = 0; phase < s.upsample; ++phase) {
      const int last = static_cast<int>(floor_div(phase - s.padding + s.kernel - 1, s.upsample));
      const int count = last - first_input(s, taps, 0, phase) + 1;
      needed = count > needed ? count : needed;
    }
  }
  if (needed > taps) return "the kernel has more taps a phase than the form";
  if (needed < taps && (needed < 2 || needed < taps - 1)) return "the kernel has fewer taps a phase than the form";
  return nullptr;
}

// Step 1 for one window and sixteen channels: pixels `row` and `pixel` apart, positions `position` apart.
template <class Tile, typename From, typename To>
static inline void transform_window(const From* x, std::int64_t row, std::int64_t pixel, To* v, std::int64_t position) {
  constexpr int kSize = Tile::kSize;
  Vec half[kSize][kSize];
  FASTSR_UNROLL for (int j = 0; j < kSize; ++j) {
    Vec d[kSize], o[kSize];
    FASTSR_UNROLL for (int i = 0; i < kSize; ++i) d[i] = load(x + i * row + j * pixel);
    Tile::input(d, o);
    FASTSR_UNROLL for (int i = 0; i < kSize; ++i) half[i][j] = o[i];
  }
  FASTSR_UNROLL for (int i = 0; i < kSize; ++i) {
    Vec o[kSize];
    Tile::input(half[i], o);
    FASTSR_UNROLL for (int j = 0; j < kSize; ++j) store(v + (i * kSize + j) * position, o[j]);
  }
}

// A source's pixels of one plane.
struct View {
  std::int64_t data;  // address of the plane's pixel (0, 0)
  std::int64_t row, pixel, height, width;
  std::int64_t origin_y, origin_x;  // of the window of tile (0, 0)
  int type;
};

// Copies the window at (y, x), sixteen channels or less, with the prologue (scale may be null) and zeros where there is
// no image: they come after the prologue.
static inline void copy_window(const View& view, std::int64_t y, std::int64_t x, int size, int channel, int lanes,
                               const float* scale, const float* shift, bool relu, float* to) {
  const Mask m = first(lanes);
  const Vec a = scale != nullptr ? load(scale) : zero(), b = scale != nullptr ? load(shift) : zero();
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j, to += kLanes) {
      if (y + i < 0 || y + i >= view.height || x + j < 0 || x + j >= view.width) {
        store(to, zero());
        continue;
      }
      Vec v = load_any(view.data, (y + i) * view.row + (x + j) * view.pixel + channel, view.type, m);
      if (scale != nullptr) v = fma(v, a, b);
      if (relu) v = positive(v);
      store(to, v);
    }
  }
}

// The tiles of a task.
struct Tiles {
  std::int64_t first, count, across;  // of the image; `across` of them make a row
};

// Step 1 for inputs begin .. end - 1 of K, both multiples of sixteen.
template <class Tile, typename T>
static void transform_inputs(const Conv& c, const Layer& l, const Packed& p, std::int64_t n, const Tiles& tiles,
                             int begin, int end, T* v, std::int64_t pitch, std::int64_t position, float* patch) {
  const Shape& s = c.shape;
  const std::int64_t step = s.transposed ? 1 : s.stride;
  int at = 0;  // of K
  for (int plane = 0; plane < l.planes * l.planes; ++plane) {
    const int plane_y = plane / l.planes, plane_x = plane % l.planes, plane_begin = at;
    for (int i = 0; i < s.sources; ++i) {
      const int source_begin = at, from = at > begin ? at : begin;
      at += static_cast<int>(round_up(s.widths[i], kBlock));
      const int to = at < end ? at : end;
      if (from >= to) continue;
      const Map& map = c.in[i];
      const std::int64_t offset_y = step > 1 ? plane_y : 0, offset_x = step > 1 ? plane_x : 0;
      const std::int64_t corner = n * map.image + offset_y * map.row + offset_x * map.pixel;
      const View view = {map.data + corner * width_of(map.type),
                         map.row * step,
                         map.pixel * step,
                         ceil_div(max_of(c.height - offset_y, 0), step),
                         ceil_div(max_of(c.width - offset_x, 0), step),
                         l.phases > 1 ? l.origin : first_input(s, Tile::kTaps, plane_y, 0),
                         l.phases > 1 ? l.origin : first_input(s, Tile::kTaps, plane_x, 0),
                         map.type};
      std::int64_t tile_y = tiles.first / tiles.across, tile_x = tiles.first % tiles.across;
      for (std::int64_t t = 0; t < tiles.count; ++t) {
        const std::int64_t y = tile_y * Tile::kOutputs + view.origin_y, x = tile_x * Tile::kOutputs + view.origin_x;
        const bool inside = y >= 0 && x >= 0 && y + Tile::kSize <= view.height && x + Tile::kSize <= view.width;
        T* row = v + t * pitch - begin;
        for (int k = from; k < to; k += kLanes) {
          const int channel = k - source_begin, lanes = static_cast<int>(min_of(s.widths[i] - channel, kLanes));
          const std::int64_t element = y * view.row + x * view.pixel + channel;
          if (!inside || lanes < kLanes || s.has_pre || s.pre_relu) {
            const int pre = k - plane_begin;
            copy_window(view, y, x, Tile::kSize, channel, lanes, s.has_pre ? p.pre_scale + pre : nullptr,
                        p.pre_shift + pre, s.pre_relu, patch);
            transform_window<Tile>(patch, Tile::kSize * kLanes, kLanes, row + k, position);
          } else if (view.type == kFloat) {
            transform_window<Tile>(reinterpret_cast<const float*>(view.data) + element, view.row, view.pixel, row + k,
                                   position);
          } else {
            transform_window<Tile>(reinterpret_cast<const bf16*>(view.data) + element, view.row, view.pixel, row + k,
                                   position);
          }
        }
        if (++tile_x == tiles.across) {
          tile_x = 0;
          ++tile_y;
        }
      }
    }
  }
}

// Step 2 for a few rows of one position: m[i][..] = sum over k of v[i][k] u[k][..], or that added to m. Rows are read
// before they are stored, so m may be v.
template <int kRows, int kBlocks, typename T>
static inline void multiply_rows(const T* v, std::int64_t pitch, const T* u, int k, bool added, float* m,
                                 std::int64_t m_pitch) {
  Vec acc[kRows][kBlocks];
  FASTSR_UNROLL for (int i = 0; i < kRows; ++i) {
    FASTSR_UNROLL for (int j = 0; j < kBlocks; ++j) acc[i][j] = zero();
  }
  add_products<kRows, kBlocks>(v, pitch, u, k, acc);
  if (added) {
    FASTSR_UNROLL for (int i = 0; i < kRows; ++i) {
      FASTSR_UNROLL for (int j = 0; j < kBlocks; ++j) {
        acc[i][j] = add(acc[i][j], load(m + i * m_pitch + j * kLanes));
      }
    }
  }
  FASTSR_UNROLL for (int i = 0; i < kRows; ++i) {
    FASTSR_UNROLL for (int j = 0; j < kBlocks; ++j) store(m + i * m_pitch + j * kLanes, acc[i][j]);
  }
}

template <int kBlocks, typename T>
static void multiply(int rows, const T* v, std::int64_t pitch, const T* u, int k, bool added, float* m,
                     std::int64_t m_pitch) {
  int i = 0;
  if constexpr (kBlocks <= 2 && kPanelBlocks > 1) {
    for (; i + 2 * kGroup <= rows; i += 2 * kGroup) {
      multiply_rows<2 * kGroup, kBlocks>(v + i * pitch, pitch, u, k, added, m + i * m_pitch, m_pitch);
    }
  }
  for (; i < rows; i += kGroup) {
    multiply_rows<kGroup, kBlocks>(v + i * pitch, pitch, u, k, added, m + i * m_pitch, m_pitch);
  }
}

template <typename T>
static inline void multiply_panel(int blocks, int rows, const T* v, std::int64_t pitch, const T* u, int k, bool added,
                                  float* m, std::int64_t m_pitch) {
  switch (blocks) {
#if defined(__AVX512F__)
    case 4:
      return multiply<4>(rows, v, pitch, u, k, added, m, m_pitch);
    case 3:
      return multiply<3>(rows, v, pitch, u, k, added, m, m_pitch);
    case 2:
      return multiply<2>(rows, v, pitch, u, k, added, m, m_pitch);
#endif
    default:
      return multiply<1>(rows, v, pitch, u, k, added, m, m_pitch);
  }
}

// The part of a block of outputs that goes to one plane of the output.
struct Part {
  Emit emit;
  int block, lane, lanes, channel;
  std::int64_t rows, columns;        // of the phase
  std::int64_t shift_y, shift_x;     // the tile's first output lies so far above (left of) tile * M
  float sums[kLanes];                // of what was stored
};

// Makes the parts of a panel for one image; returns their number, at most sixteen a block.
template <class Tile>
static int make_parts(const Conv& c, const Layer& l, const Packed& packed, std::int64_t n, const Panel& panel,
                      Part* parts) {
  const Shape& s = c.shape;
  const int end = (panel.block + panel.blocks) * kBlock;
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

// Step 3 for one tile and block of sixteen outputs.
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
static inline void store_tile(Part& part, const Vec (&v)[Tile::kOutputs][Tile::kOutputs], std::int64_t tile_y,
                              std::int64_t tile_x) {
  constexpr int kOutputs = Tile::kOutputs;
  const std::int64_t y = tile_y * kOutputs - part.shift_y, x = tile_x * kOutputs - part.shift_x;
  Vec sums = kSums ? load(part.sums) : zero();
  const int top = static_cast<int>(max_of(0, -y)), bottom = static_cast<int>(min_of(kOutputs, part.rows - y));
  if (part.lane == 0 && x >= 0 && x + kOutputs <= part.columns) {
    for (int i = top; i < bottom; ++i) emit<kOutputs, kSums>(part.emit, y + i, x, kOutputs, v[i], sums);
  } else {
    const int left = static_cast<int>(max_of(0, -x)), right = static_cast<int>(min_of(kOutputs, part.columns - x));
    alignas(64) float moved[2 * kLanes];
    store(moved + kLanes, zero());
    for (int i = top; i < bottom; ++i) {
      for (int j = left; j < right; ++j) {
        store(moved, v[i][j]);
        const Vec lanes[1] = {load(moved + part.lane)};
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

template <class Tile, bool kSums>
static void store_panel(const Conv& c, std::int64_t n, const Tiles& tiles, const float* m, std::int64_t pitch,
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

// How a task computes a layer. V holds either all of K, and M one panel; or V holds one chunk of K at a time, and M all
// panels: whichever is less. With one panel and one chunk as wide as it, M overwrites V.
struct Scheme {
  bool chunked, in_place;
  int v_pitch, m_pitch;  // elements a tile
};

static inline Scheme make_scheme(const Shape& s, const Layer& l) {
  const Panel p = panel_from(s, l, 0);
  const std::int64_t element = s.bf16_products ? 2 : 4, columns = p.blocks * kBlock;  // of the largest panel
  Scheme scheme = {};
  scheme.chunked = s.groups == 1 && p.chunk * element + l.outputs * 4 < l.inputs * element + columns * 4;
  scheme.v_pitch = scheme.chunked ? p.chunk : l.inputs;
  scheme.m_pitch = scheme.chunked ? l.outputs : static_cast<int>(columns);
  scheme.in_place = !s.bf16_products && p.chunks == 1 && columns == l.outputs && columns <= l.inputs && s.groups == 1 &&
                    !scheme.chunked;
  if (scheme.in_place) scheme.m_pitch = scheme.v_pitch;
  return scheme;
}

enum Own { kTilesY, kTilesX, kTasks, kTiles, kProductsAt, kPatchAt, kPartsAt };

template <class Tile>
static Plan plan(const Conv& c, int threads) {
  const Shape& s = c.shape;
  const Layer l = make_layer(s, Tile::kTaps);
  const Scheme scheme = make_scheme(s, l);
  Plan p = {};
  for (int phase = 0; phase < l.phases; ++phase) {
    const std::int64_t shift = first_input(s, Tile::kTaps, 0, phase) - l.origin;
    const std::int64_t rows = ceil_div(max_of(c.out_height - phase, 0), l.phases);
    const std::int64_t columns = ceil_div(max_of(c.out_width - phase, 0), l.phases);
    if (rows > 0) p.own[kTilesY] = max_of(p.own[kTilesY], ceil_div(rows + shift, Tile::kOutputs));
    if (columns > 0) p.own[kTilesX] = max_of(p.own[kTilesX], ceil_div(columns + shift, Tile::kOutputs));
  }
  const std::int64_t element = s.bf16_products ? 2 : 4;
  const std::int64_t bytes = Tile::kPositions * (scheme.v_pitch * element + (scheme.in_place ? 0 : scheme.m_pitch * 4));
  const std::int64_t most = max_of(kCacheBytes / (kGroup * bytes), 1);
  const std::int64_t groups = ceil_div(p.own[kTilesY] * p.own[kTilesX], kGroup);
  const std::int64_t wanted = ceil_div(kTasksAThread * threads, c.n);  // tasks an image
  p.own[kTasks] = max_of(ceil_div(groups, min_of(most, max_of(groups / wanted, 1))), 1);
  p.own[kTiles] = ceil_div(groups, p.own[kTasks]) * kGroup;
  const std::int64_t line = 64;
  p.own[kProductsAt] = Tile::kPositions * (p.own[kTiles] * scheme.v_pitch * element + line);
  p.own[kPatchAt] = p.own[kProductsAt];
  if (scheme.in_place) {
    p.own[kProductsAt] = 0;
  } else {
    p.own[kPatchAt] += Tile::kPositions * (p.own[kTiles] * scheme.m_pitch * 4 + line);
  }
  p.own[kPartsAt] = p.own[kPatchAt] + Tile::kPositions * kLanes * 4;
  p.scratch = p.own[kPartsAt] + kPanelBlocks * kBlock * static_cast<std::int64_t>(sizeof(Part));
  p.tasks = c.n * p.own[kTasks];
  p.partials = groups;
  return p;
}

template <class Tile, typename T>
static void run_tiles(const Conv& c, const Plan& plan, std::int64_t task, void* scratch) {
  constexpr int kPositions = Tile::kPositions;
  const Shape& s = c.shape;
  const Layer l = make_layer(s, Tile::kTaps);
  const Scheme scheme = make_scheme(s, l);
  const Packed packed = unpack(l, s.has_pre, reinterpret_cast<void*>(c.packed.data));
  const std::int64_t n = task / plan.own[kTasks], part = task % plan.own[kTasks];
  const std::int64_t group = part * plan.partials / plan.own[kTasks];
  const std::int64_t group_end = (part + 1) * plan.partials / plan.own[kTasks];
  const std::int64_t all_tiles = plan.own[kTilesY] * plan.own[kTilesX];
  const Tiles tiles = {group * kGroup, min_of(group_end * kGroup, all_tiles) - group * kGroup, plan.own[kTilesX]};
  if (tiles.count <= 0) return;
  const int rows = static_cast<int>(round_up(tiles.count, kGroup));

  char* memory = static_cast<char*>(scratch);
  T* v = reinterpret_cast<T*>(memory);
  float* m = reinterpret_cast<float*>(memory + plan.own[kProductsAt]);
  float* patch = reinterpret_cast<float*>(memory + plan.own[kPatchAt]);
  Part* parts = reinterpret_cast<Part*>(memory + plan.own[kPartsAt]);
  const std::int64_t v_position = plan.own[kTiles] * scheme.v_pitch + 64 / static_cast<int>(sizeof(T));
  const std::int64_t m_position = scheme.in_place ? v_position : plan.own[kTiles] * scheme.m_pitch + 16;

  if (c.partial.data != 0) {
    for (std::int64_t g = group; g < group_end; ++g) {
      float* row = reinterpret_cast<float*>(c.partial.data) + n * c.partial.image + g * c.partial.row;
      std::memset(row, 0, round_up(l.width, kBlock) * 4);
    }
  }
  // The last register block reads whole rows of V; what is in them must not be slow to multiply.
  for (int position = 0; rows > tiles.count && position < kPositions; ++position) {
    std::memset(v + position * v_position + tiles.count * scheme.v_pitch, 0,
                (rows - tiles.count) * scheme.v_pitch * sizeof(T));
  }

  auto finish = [&](const Panel& panel, const float* products) {
    const int count = make_parts<Tile>(c, l, packed, n, panel, parts);
    if (c.partial.data != 0) {
      for (int i = 0; i < count; ++i) store(parts[i].sums, zero());
      store_panel<Tile, true>(c, n, tiles, products, scheme.m_pitch, m_position, parts, count);
    } else {
      store_panel<Tile, false>(c, n, tiles, products, scheme.m_pitch, m_position, parts, count);
    }
  };
  // The product of one chunk of a panel at one position.
  auto product = [&](const Panel& panel, const char* weights, int chunk, int position, int k, float* to) {
    const int begin = chunk * panel.chunk;
    const int length = static_cast<int>(min_of(panel.chunk, panel.end - panel.begin - begin));
    const T* u = reinterpret_cast<const T*>(weights) +
                 (static_cast<std::int64_t>(begin) * kPositions + static_cast<std::int64_t>(position) * length) *
                     panel.blocks * kBlock;
    multiply_panel(panel.blocks, rows, v + position * v_position + k, scheme.v_pitch, u, length, chunk > 0,
                   to + position * m_position, scheme.m_pitch);
  };

  const int blocks = l.outputs / kBlock;
  if (scheme.chunked) {
    const Panel whole = panel_from(s, l, 0);
    for (int chunk = 0; chunk < whole.chunks; ++chunk) {
      const int begin = chunk * whole.chunk;
      transform_inputs<Tile>(c, l, packed, n, tiles, begin, static_cast<int>(min_of(begin + whole.chunk, l.inputs)), v,
                             scheme.v_pitch, v_position, patch);
      const char* weights = packed.weights;
      for (int block = 0; block < blocks;) {
        const Panel panel = panel_from(s, l, block);
        float* to = m + block * kBlock;
        for (int position = 0; position < kPositions; ++position) product(panel, weights, chunk, position, 0, to);
        if (chunk + 1 == whole.chunks) finish(panel, to);
        weights += panel_bytes(s, panel, kPositions);
        block += panel.blocks;
      }
    }
    return;
  }
  transform_inputs<Tile>(c, l, packed, n, tiles, 0, l.inputs, v, scheme.v_pitch, v_position, patch);
  const char* weights = packed.weights;
  for (int block = 0; block < blocks;) {
    const Panel panel = panel_from(s, l, block);
    for (int position = 0; position < kPositions; ++position) {
      for (int chunk = 0; chunk < panel.chunks; ++chunk) {
        product(panel, weights, chunk, position, panel.begin + chunk * panel.chunk, m);
      }
    }
    finish(panel, m);
    weights += panel_bytes(s, panel, kPositions);
    block += panel.blocks;
  }
}

template <class Tile>
static void run(const Conv& c, const Plan& plan, std::int64_t task, void* scratch) {
#if defined(__AVX512BF16__)
  if (c.shape.bf16_products) return run_tiles<Tile, bf16>(c, plan, task, scratch);
#endif
  run_tiles<Tile, float>(c, plan, task, scratch);
}

template <class Tile>
static const char* refuse(const Shape& s) {
  if (s.bf16_products && !Tile::kBf16) return "products of bfloat16 are not accurate enough in this form";
  return refuse_taps(s, Tile::kTaps);
}

template <class Tile>
constexpr Algorithm kAlgorithm = {refuse<Tile>, packed_bytes<Tile>, pack<Tile>, plan<Tile>, run<Tile>};

}  // namespace winograd

constexpr Algorithm kWinograd43Algorithm = winograd::kAlgorithm<winograd::Tile43>;
constexpr Algorithm kWinograd23Algorithm = winograd::kAlgorithm<winograd::Tile23>;
constexpr Algorithm kWinograd63Algorithm = winograd::kAlgorithm<winograd::Tile63>;
constexpr Algorithm kWinograd25Algorithm = winograd::kAlgorithm<winograd::Tile25>;
constexpr Algorithm kWinograd35Algorithm = winograd::kAlgorithm<winograd::Tile35>;
constexpr Algorithm kWinograd42Algorithm = winograd::kAlgorithm<winograd::Tile42>;
constexpr Algorithm kWinograd32Algorithm = winograd::kAlgorithm<winograd::Tile32>;

}  // namespace
}  // namespace fastsr::cpu
