// The convolution engine's contract: what one convolution is, in plain data.
//
//   y = store(outer + outer_gain * post(modulate(gain * act(pre(x) * W + b) * scale[n, c] + skip_gain * skip)))
//
// Maps are stored N, H, W, C in bfloat16 or float16 with any strides but that of the channels, which is 1.
//
// Where `range` is given, products are of e4m3 (sm_90 only). Sources and weights then hold pairs of neighbouring
// channels where else they hold one, and channels of theirs are counted in pairs; so nothing else on the way to the
// product differs. The weights' scales, one a row, stand in the place of slopes. What is added is of the maps' type.
//
// Every convolution of the networks is brought into one form. The *grid* is the set of positions that one pass
// computes; a position's tile is 8 wide. An output *block* is up to 64 rows of weights, in octets of eight channels,
// and each octet says to which pixel of the position's cell it goes: so phases of a transposed or upsampled
// convolution, PixelShuffle, and two output rows at once are ways of filling octets. A *chunk* of the sum is a few
// channels of one source, read at grid positions times a step plus a phase: so strides are phases of the input. A chunk
// has taps, each an offset into the halo tile in shared memory. Blocks, chunks and taps are a table that
// fastsr/_cuda_forms.py makes once per shape of convolution (`lower`), together with the order of the packed weights.
#pragma once

#include <cstdint>

namespace fastsr::cuda {

constexpr int kMaxSources = 24;
constexpr int kOctets = 8;       // of a block
constexpr int kTileColumns = 8;  // positions that a tile is wide: one core matrix, one ldmatrix row group

enum Type : std::int32_t { kBf16 = 0, kFp16 = 1 };
// kLeaky: one slope for all channels, 1 standing for no activation. kPrelu: slopes in the packed weights.
enum Act : std::int32_t { kRelu = 0, kLeaky = 1, kPrelu = 2 };
// Which main loop; weights are packed for one of them. kLast: last_conv.cuh.
enum Arch : std::int32_t { kLast = 27, kSm80 = 80, kSm90 = 90 };

// A map. In a program, `data` is an offset in bytes into the tensor `slot`; to a kernel, it is an address. slot = -1 or
// data = 0: there is none. Strides in elements.
struct Map {
  std::int64_t data;
  std::int64_t image, row;
  std::int32_t pixel;
  std::int32_t slot;
};

// Eight rows of a block: `valid` channels from `channel` on go to the pixel
// ((grid row * row_pitch + row) * step_out + py, grid column * step_out + px).
struct OctetPlace {
  std::int32_t row, py, px, channel, valid;
};

struct Block {
  std::int32_t first_chunk, chunks;
  OctetPlace octets[kOctets];
};

// `valid` channels from `channel` on of a source, read at pixel (row * step_in + py, column * step_in + px).
struct Chunk {
  std::int32_t source, channel, valid, py, px;
  std::int32_t first_tap, taps;
  std::int32_t first_tile;  // of the packed weights, counted in tiles of `rows` x 16
  std::int32_t k;           // index of its first channel among all sources', for the prologue
};

struct ConvParams {
  Map source[kMaxSources];
  Map out, skip[2], factor, term, outer;
  Map scale;    // (n, channels), float32 if scale_is_float
  Map packed;   // weight tiles, then bias[blocks * rows], slope[blocks * rows], pre_scale[k], pre_shift[k]
  Map table;    // Block[blocks], Chunk[chunks], int32 taps
  Map partial;  // float32 (n, tiles, channels): sums of what was stored, a tile at a time
  Map range;    // float32 (n): the scale of the e4m3 maps of an image; none: products are of the maps' type
  std::int32_t type, arch;
  std::int32_t n, grid_h, grid_w;
  std::int32_t in_h, in_w, step_in;                // of every source
  std::int32_t out_h, out_w, step_out, row_pitch;  // row_pitch: output rows of a grid row, 1 or 2
  std::int32_t halo_y, halo_x;                     // the tile's first halo row and column, relative to its own first
  std::int32_t halo_more, halo_w;                  // halo rows beyond (tile rows * row_pitch); halo columns
  std::int32_t blocks, rows;                       // rows of a block: 16, 32 or 64
  std::int32_t chunks, taps_most, steps;           // taps_most: of one chunk; steps: of 16 channels in a chunk
  std::int32_t tiles;                              // weight tiles of all blocks
  std::int32_t block_tiles;                        // weight tiles of the largest block
  std::int32_t channels;                           // of the output map
  std::int32_t skip_split;                         // channels of the first of two skips
  std::int32_t act, post_relu, has_pre, pre_relu, pre_count, has_bias, scale_is_float;
  std::int32_t float8_out;             // the result is stored as e4m3, by the image's scale
  std::int32_t vector_in, vector_out;  // whether every octet of the sources (of the epilogue's maps) is 16-byte aligned
  float slope, gain, skip_gain, outer_gain;
};

constexpr int kDoesNotFit = -1;  // no tile fits into shared memory

// Launches one convolution; returns a CUDA error code or kDoesNotFit. sms: multiprocessors of the device.
int launch_conv_sm80(const ConvParams& p, int sms, void* stream);
int launch_conv_sm90(const ConvParams& p, int sms, void* stream);
int launch_last_conv(const ConvParams& p, void* stream);

}  // namespace fastsr::cuda
