// Winograd convolution: transform windows of the input, multiply position by position, transform back and store.
//
// Tiles of an image, in the order of rows, are cut into batches of T tiles, and batches make tasks. For a batch:
//
//   1. In d In^T of every window, sixteen channels at once, to V[position][tile][input]. Windows are read where they lie.
//   2. For every position M = V U, a T x K by K x 64 product.
//   3. Out m Out^T of every tile and the whole epilogue, to the M x M pixels that are inside the image.
//
// V, M and the weights U in use stay in the second-level cache, which bounds T. Positions of V and M are a cache line
// further apart than they need to be: as powers of two they would all fall in the same few sets of the first level.
#pragma once

#include "cpu/conv/products.h"
#include "cpu/conv/winograd_outputs.h"

namespace fastsr::cpu {
namespace {
namespace winograd {

// Of the second-level cache (1 MB on the processors we know): V and M have what weights leave them, and not more than is
// of use; where weights do not fit, they are read again for every batch, which should then be large.
constexpr std::int64_t kCacheBytes = 840 << 10, kMostBytes = 340 << 10, kStreamingBytes = 500 << 10;
constexpr int kTasksAThread = 4;
constexpr std::int64_t kLineBytes = 64;

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

template <class Tile>
static const char* refuse(const Shape& s) {
  if (s.bf16_products && !Tile::kBf16) return "products of bfloat16 are not accurate enough in this form";
  return refuse_taps(s, Tile::kTaps);
}

// Products at `positions` positions: m[i][..] = sum over k of v[i][k] u[k][..], or that added to m. A position has `rows`
// rows, a multiple of kGroup.
template <typename T>
struct Matrices {
  const T *v, *u;
  float* m;
  int positions, rows, k;
  std::int64_t v_position, u_position, m_position, v_pitch, m_pitch;
  bool added;
  Ahead* ahead;
  std::int64_t lines;    // of it are fetched with every kSteps steps
  std::int64_t u_lines;  // and so many of the next position's weights
};

constexpr int kSteps = 2;  // of a product, each over one input or a pair of bfloat16 inputs, between fetches

// Rows are read before they are stored, so m may be v.
template <int kRows, int kBlocks, typename T>
FASTSR_NOINLINE void multiply_rows(const Matrices<T>& p, const T* v, const T* u, float* m, const char* next_u) {
  Vec acc[kRows][kBlocks];
  FASTSR_UNROLL for (int i = 0; i < kRows; ++i) {
    FASTSR_UNROLL for (int j = 0; j < kBlocks; ++j) acc[i][j] = zero();
  }
  Ahead::Cursor cursor = p.ahead->cursor;
  const std::int64_t lines = p.lines, u_lines = p.u_lines;
  Rows<kRows, T> rows(v, p.v_pitch);
  int steps = sizeof(T) == 4 ? p.k : p.k / 2;
  for (; steps >= kSteps; steps -= kSteps) {
    FASTSR_UNROLL for (int i = 0; i < kSteps; ++i) add_steps<1>(rows, u, acc);
    cursor.fetch(lines);
    for (std::int64_t i = 0; i < u_lines; ++i, next_u += Ahead::kLine) _mm_prefetch(next_u, _MM_HINT_T0);
  }
  for (; steps > 0; --steps) add_steps<1>(rows, u, acc);
  p.ahead->cursor = cursor;
  if (p.added) {
    FASTSR_UNROLL for (int i = 0; i < kRows; ++i) {
      FASTSR_UNROLL for (int j = 0; j < kBlocks; ++j) {
        acc[i][j] = add(acc[i][j], load(m + i * p.m_pitch + j * kLanes));
      }
    }
  }
  FASTSR_UNROLL for (int i = 0; i < kRows; ++i) {
    FASTSR_UNROLL for (int j = 0; j < kBlocks; ++j) store(m + i * p.m_pitch + j * kLanes, acc[i][j]);
  }
}

// Rows from `row` on. As many accumulators as there are registers for, 24 of 32: 6 x 4, 6 x 3, 12 x 2, 24 x 1. With AVX2
// (16 registers, two a Vec), 6 x 1.
template <int kRows, int kBlocks, typename T>
FASTSR_INLINE void multiply_position(const Matrices<T>& p, int row, const T* v, const T* u, float* m) {
  for (; row + kRows <= p.rows; row += kRows) {
    const std::int64_t fetched = row / kRows * (p.k * sizeof(T) / (4 * kSteps)) * p.u_lines;
    const char* next_u = reinterpret_cast<const char*>(u + p.u_position) + fetched * Ahead::kLine;
    multiply_rows<kRows, kBlocks>(p, v + row * p.v_pitch, u, m + row * p.m_pitch, next_u);
  }
  if constexpr (kRows > kGroup) {
    if (row < p.rows) multiply_position<kRows - kGroup, kBlocks>(p, row, v, u, m);
  }
}

template <int kRows, int kBlocks, typename T>
static void multiply(const Matrices<T>& p) {
  for (int i = 0; i < p.positions; ++i) {
    multiply_position<kRows, kBlocks>(p, 0, p.v + i * p.v_position, p.u + i * p.u_position, p.m + i * p.m_position);
  }
}

template <typename T>
static inline void multiply_strip(int blocks, const Matrices<T>& p) {
  switch (blocks) {
#if defined(__AVX512F__)
    case 4:
      return multiply<kGroup, 4>(p);
    case 3:
      return multiply<kGroup, 3>(p);
    case 2:
      return multiply<2 * kGroup, 2>(p);
    default:
      return multiply<4 * kGroup, 1>(p);
#else
    default:
      return multiply<kGroup, 1>(p);
#endif
  }
}

// How a batch computes a layer. V holds either all of K, and M one panel; or V holds one chunk of K at a time, and M all
// panels: whichever is less. With one panel, M overwrites V if no strip's sums overwrite what another strip reads.
struct Scheme {
  bool chunked, in_place;
  int v_pitch, m_pitch;  // elements a tile
};

static inline Scheme make_scheme(const Shape& s, const Layer& l) {
  const Panel p = panel_from(s, l, 0, 1);
  const Strip& first = p.strip[0];
  const int element = s.bf16_products ? 2 : 4, columns = p.blocks * kBlock;  // of the largest panel
  Scheme scheme;
  scheme.chunked = s.groups == 1 && first.chunk * element + l.outputs * 4 < l.inputs * element + columns * 4;
  scheme.v_pitch = scheme.chunked ? first.chunk : l.inputs;
  scheme.m_pitch = scheme.chunked ? l.outputs : columns;
  scheme.in_place = !s.bf16_products && columns == l.outputs && columns <= scheme.v_pitch && !scheme.chunked;
  for (int i = 0; i < p.strips; ++i) {
    const Strip& t = p.strip[i];
    const bool own = t.begin == t.block * kBlock && t.end - t.begin == t.blocks * kBlock;
    scheme.in_place = scheme.in_place && t.chunks == 1 && (p.strips == 1 || own);
  }
  if (scheme.in_place) scheme.m_pitch = scheme.v_pitch;
  return scheme;
}

// Plan::own: tiles of an image; batches of an image, and tiles of the largest; tasks of an image; whether
// products fetch the weights of the next; parts of the scratch.
enum Own { kTilesY, kTilesX, kBatches, kTiles, kTasks, kFetchWeights, kProductsAt, kOthersAt };

// What stands behind V and M in the scratch. Behind it are zeros, as many as the inputs of a plane.
struct Others {
  Ahead ahead;
  Part parts[Panel::kBlocks * kBlock];
};

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
  const std::int64_t groups = ceil_div(p.own[kTilesY] * p.own[kTilesX], kGroup);
  const std::int64_t wanted = ceil_div(kTasksAThread * threads, c.n);  // tasks an image
  const std::int64_t weights = packed_bytes<Tile>(s);
  const bool stays = weights < kCacheBytes - kMostBytes / 2;
  const std::int64_t room = stays ? min_of(kCacheBytes - weights, kMostBytes) : kStreamingBytes;
  p.own[kFetchWeights] = weights > 2 * kCacheBytes;
  const std::int64_t most = max_of(room / (kGroup * bytes), 1);
  const std::int64_t batch = max_of(min_of(most, groups / wanted), 1);  // in groups
  p.own[kBatches] = max_of(ceil_div(groups, batch), 1);
  p.own[kTiles] = ceil_div(groups, p.own[kBatches]) * kGroup;
  p.own[kTasks] = ceil_div(p.own[kBatches], max_of(p.own[kBatches] / wanted, 1));
  p.own[kProductsAt] = Tile::kPositions * (p.own[kTiles] * scheme.v_pitch * element + kLineBytes);
  p.own[kOthersAt] = p.own[kProductsAt];
  if (scheme.in_place) {
    p.own[kProductsAt] = 0;
  } else {
    p.own[kOthersAt] += Tile::kPositions * (p.own[kTiles] * scheme.m_pitch * 4 + kLineBytes);
  }
  p.scratch = p.own[kOthersAt] + static_cast<std::int64_t>(sizeof(Others)) + 4 * l.plane_inputs;
  p.tasks = c.n * p.own[kTasks];
  p.partials = groups;
  return p;
}

template <class Tile, typename T>
struct Task {
  static constexpr int kPositions = Tile::kPositions;

  const Conv& c;
  const Plan& plan;
  const Layer l;
  const Scheme scheme;
  const Packed packed;
  std::int64_t n, batch, batch_end;
  std::int64_t v_position, m_position;
  T* v;
  float* m;
  Others& others;
  char* zeros;
  Panel panel;

  Task(const Conv& c, const Plan& plan, std::int64_t task, char* scratch)
      : c(c),
        plan(plan),
        l(make_layer(c.shape, Tile::kTaps)),
        scheme(make_scheme(c.shape, l)),
        packed(unpack(l, c.shape.has_pre, reinterpret_cast<void*>(c.packed.data))),
        n(task / plan.own[kTasks]),
        batch(task % plan.own[kTasks] * plan.own[kBatches] / plan.own[kTasks]),
        batch_end((task % plan.own[kTasks] + 1) * plan.own[kBatches] / plan.own[kTasks]),
        v_position(plan.own[kTiles] * scheme.v_pitch + kLineBytes / static_cast<int>(sizeof(T))),
        m_position(scheme.in_place ? v_position : plan.own[kTiles] * scheme.m_pitch + kLineBytes / 4),
        v(reinterpret_cast<T*>(scratch)),
        m(reinterpret_cast<float*>(scratch + plan.own[kProductsAt])),
        others(*reinterpret_cast<Others*>(scratch + plan.own[kOthersAt])),
        zeros(scratch + plan.own[kOthersAt] + sizeof(Others)) {
    panel.block = -1;
    others.ahead.clear();
    std::memset(zeros, 0, 4 * l.plane_inputs);
  }

  void find_panel(int block) {
    if (panel.block != block) panel = panel_from(c.shape, l, block, kPositions);
  }

  Tiles tiles_of(std::int64_t batch) const {
    const std::int64_t first = batch * plan.partials / plan.own[kBatches] * kGroup;
    const std::int64_t end = (batch + 1) * plan.partials / plan.own[kBatches] * kGroup;
    return {first, min_of(end, plan.own[kTilesY] * plan.own[kTilesX]) - first, plan.own[kTilesX]};
  }

  void transform(const Tiles& tiles, int begin, int end) {
    transform_inputs<Tile>(c, l, packed, n, tiles, begin, end, zeros, v, scheme.v_pitch, v_position);
  }

  // One chunk of a panel at some positions; `lines` are fetched with every kSteps steps.
  void multiply_chunk(const Strip& strip, const char* weights, const Tiles& tiles, int chunk,
                      int position, int positions, float* to, std::int64_t lines) {
    const int begin = chunk * strip.chunk, columns = strip.blocks * kBlock;
    Matrices<T> p;
    p.k = static_cast<int>(min_of(strip.chunk, strip.end - strip.begin - begin));
    p.positions = positions;
    p.rows = static_cast<int>(round_up(tiles.count, kGroup));
    p.v_position = v_position;
    p.u_position = static_cast<std::int64_t>(p.k) * columns;
    p.m_position = m_position;
    p.v = v + position * v_position + (scheme.chunked ? 0 : strip.begin + begin);
    p.u = reinterpret_cast<const T*>(weights + strip.weights) + static_cast<std::int64_t>(begin) * kPositions * columns +
          position * p.u_position;
    p.m = to + position * m_position + (strip.block - panel.block) * kBlock;
    p.v_pitch = scheme.v_pitch;
    p.m_pitch = scheme.m_pitch;
    p.added = chunk > 0;
    p.lines = lines;
    const std::int64_t fetches = max_of(fetches_of(strip, p.rows), 1);
    p.u_lines = plan.own[kFetchWeights] ? ceil_div(p.u_position * sizeof(T) / Ahead::kLine, fetches) : 0;
    p.ahead = &others.ahead;
    multiply_strip(strip.blocks, p);
  }

  // How often something is fetched during one position of a chunk.
  static std::int64_t fetches_of(const Strip& t, std::int64_t rows) {
    const int block_rows = t.blocks > 2 || kPanelBlocks == 1 ? kGroup : 24 / t.blocks;
    return ceil_div(rows, block_rows) * t.chunk * sizeof(T) / (4 * kSteps);
  }

  // Starts fetching what is listed; returns how many lines make it end with the panel's products, or with so many chunks
  // of them.
  std::int64_t begin_ahead(const Tiles& tiles, int chunks) {
    std::int64_t fetches = 0;
    for (int i = 0; i < panel.strips; ++i) {
      const Strip& t = panel.strip[i];
      fetches += kPositions * (chunks > 0 ? chunks : t.chunks) * fetches_of(t, tiles.count);
    }
    others.ahead.begin();
    return ceil_div(others.ahead.lines, fetches);
  }

  int expect_panel(const Tiles& tiles) {
    const int count = make_parts<Tile>(c, l, packed, n, panel, others.parts);
    expect_outputs<Tile>(tiles, others.parts, count, others.ahead);
    return count;
  }

  void finish_panel(const Tiles& tiles, const float* sums, int count) {
    if (c.partial.data == 0) {
      store_tiles<Tile, false>(c, n, tiles, sums, scheme.m_pitch, m_position, others.parts, count);
      return;
    }
    for (int i = 0; i < count; ++i) store(others.parts[i].sums, zero());
    store_tiles<Tile, true>(c, n, tiles, sums, scheme.m_pitch, m_position, others.parts, count);
  }

  // V holds all of K, M one panel.
  void run_panels(const Tiles& tiles, const Tiles& next) {
    transform(tiles, 0, l.inputs);
    const char* weights = packed.weights;
    for (int block = 0; block < l.outputs / kBlock;) {
      find_panel(block);
      block += panel.blocks;
      others.ahead.clear();
      const int count = expect_panel(tiles);
      if (block == l.outputs / kBlock) expect_inputs<Tile>(c, l, n, next, 0, l.inputs, others.ahead);
      const std::int64_t lines = begin_ahead(tiles, 0);
      for (int i = 0; i < panel.strips; ++i) {
        const Strip& strip = panel.strip[i];
        // Chunks of one position follow each other, while their sums are in the first-level cache.
        const int at_once = strip.chunks == 1 ? kPositions : 1;
        for (int position = 0; position < kPositions; position += at_once) {
          for (int chunk = 0; chunk < strip.chunks; ++chunk) {
            multiply_chunk(strip, weights, tiles, chunk, position, at_once, m, lines);
          }
        }
      }
      finish_panel(tiles, m, count);
      weights += panel.bytes;
    }
  }

  // V holds one chunk of K, M all panels.
  void run_chunks(const Tiles& tiles, const Tiles& next) {
    const Strip whole = strip_from(c.shape, l, 0, 1);
    for (int chunk = 0; chunk < whole.chunks; ++chunk) {
      const int begin = chunk * whole.chunk, end = static_cast<int>(min_of(begin + whole.chunk, l.inputs));
      const bool last = chunk + 1 == whole.chunks;
      transform(tiles, begin, end);
      others.ahead.clear();
      if (last) {
        expect_inputs<Tile>(c, l, n, next, 0, whole.chunk, others.ahead);
      } else {
        expect_inputs<Tile>(c, l, n, tiles, end, static_cast<int>(min_of(end + whole.chunk, l.inputs)), others.ahead);
      }
      const char* weights = packed.weights;
      std::int64_t lines = 0;
      for (int block = 0; block < l.outputs / kBlock;) {
        find_panel(block);
        float* to = m + block * kBlock;
        const int count = last ? expect_panel(tiles) : 0;
        if (last || block == 0) lines = begin_ahead(tiles, last ? 1 : l.outputs / kBlock / panel.blocks);
        for (int i = 0; i < panel.strips; ++i) {
          multiply_chunk(panel.strip[i], weights, tiles, chunk, 0, kPositions, to, lines);
        }
        if (last) {
          finish_panel(tiles, to, count);
          others.ahead.clear();
        }
        weights += panel.bytes;
        block += panel.blocks;
      }
    }
  }

  void run() {
    // Nobody has fetched what the first batch reads.
    expect_inputs<Tile>(c, l, n, tiles_of(batch), 0, scheme.v_pitch, others.ahead);
    others.ahead.begin();
    others.ahead.cursor.fetch(others.ahead.lines);
    for (; batch < batch_end; ++batch) {
      const Tiles tiles = tiles_of(batch);
      const Tiles next = batch + 1 < batch_end ? tiles_of(batch + 1) : Tiles{0, 0, 1};
      if (tiles.count <= 0) continue;
      // The last register block reads whole rows of V; what is in them must not be slow to multiply.
      const std::int64_t unused = round_up(tiles.count, kGroup) - tiles.count;
      for (int position = 0; unused > 0 && position < kPositions; ++position) {
        std::memset(v + position * v_position + tiles.count * scheme.v_pitch, 0, unused * scheme.v_pitch * sizeof(T));
      }
      if (c.partial.data != 0) {
        for (std::int64_t t = tiles.first; t < tiles.first + tiles.count; t += kGroup) {
          float* row = reinterpret_cast<float*>(c.partial.data) + n * c.partial.image + t / kGroup * c.partial.row;
          std::memset(row, 0, round_up(l.width, kBlock) * 4);
        }
      }
      if (scheme.chunked) {
        run_chunks(tiles, next);
      } else {
        run_panels(tiles, next);
      }
    }
    end_stream();
  }
};

template <class Tile>
static void run(const Conv& c, const Plan& plan, std::int64_t task, void* scratch) {
#if defined(__AVX512BF16__)
  if (c.shape.bf16_products) return Task<Tile, bf16>(c, plan, task, static_cast<char*>(scratch)).run();
#endif
  Task<Tile, float>(c, plan, task, static_cast<char*>(scratch)).run();
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
