#include "cuda/program.h"

#include <cstring>

#include "cuda/conv/tile.h"

namespace fastsr::cuda {
namespace {

constexpr int kMalformed = -2, kNoSuchKernel = -3;

// Turns (slot, offset) into an address. Returns false for a slot that does not exist.
struct Resolver {
  void* const* tensors;
  int count;
  bool good = true;

  void operator()(Map& m) {
    if (m.slot < 0) {
      m.data = 0;
    } else if (m.slot >= count || tensors[m.slot] == nullptr) {
      good = false;
    } else {
      m.data += reinterpret_cast<std::int64_t>(tensors[m.slot]);
    }
  }
  template <typename... Maps>
  void all(Maps&... maps) {
    (operator()(maps), ...);
  }
};

int tile_height(const ConvParams& p, int sms) {
  return p.arch == kSm90 ? choose_sm90(p, sms).height : 4 * choose_sm80(p, sms).warps;
}

int launch_conv(const ConvParams& p, int sms, void* stream) {
  if (p.arch == kSm80) return launch_conv_sm80(p, sms, stream);
  if (p.arch == kLast) return launch_last_conv(p, stream);
#if defined(FASTSR_SM90) || !defined(__CUDACC__)
  if (p.arch == kSm90) return launch_conv_sm90(p, sms, stream);
#endif
  return kNoSuchKernel;
}

template <typename Params>
bool read(const unsigned char* body, int bytes, Params& p) {
  if (bytes != static_cast<int>(sizeof(StepHead) + sizeof(Params))) return false;
  std::memcpy(&p, body, sizeof p);
  return true;
}

int run_step(const StepHead& head, const unsigned char* body, Resolver& resolve, int sms, void* stream, int& partials) {
  switch (head.kind) {
    case kConvStep: {
      ConvParams p;
      if (!read(body, head.bytes, p)) return kMalformed;
      for (Map& m : p.source) resolve(m);
      resolve.all(p.out, p.skip[0], p.skip[1], p.factor, p.term, p.outer, p.scale, p.packed, p.table, p.partial,
                  p.range);
      if (!resolve.good) return kMalformed;
      if (p.partial.data != 0) partials = tiles_of_image(p, tile_height(p, sms));
      return launch_conv(p, sms, stream);
    }
    case kGateStep: {
      GateParams p;
      if (!read(body, head.bytes, p)) return kMalformed;
      resolve.all(p.map, p.partial, p.scratch, p.weight, p.bias, p.down_weight, p.down_bias, p.up_weight, p.up_bias,
                  p.out);
      if (!resolve.good) return kMalformed;
      p.partials = partials;  // of the convolution before
      return launch_gate(p, stream);
    }
    case kScaleStep: {
      ScaleParams p;
      if (!read(body, head.bytes, p)) return kMalformed;
      resolve.all(p.x, p.gate, p.out);
      return resolve.good ? launch_scale(p, stream) : kMalformed;
    }
    case kResidualEStep: {
      ResidualEParams p;
      if (!read(body, head.bytes, p)) return kMalformed;
      resolve.all(p.x, p.out, p.packed);
      return resolve.good ? launch_residual_e(p, stream) : kMalformed;
    }
#if defined(FASTSR_SM90) || !defined(__CUDACC__)
    case kFloat8Step: {
      Float8Params p;
      if (!read(body, head.bytes, p)) return kMalformed;
      resolve.all(p.x, p.out, p.largest, p.range);
      return resolve.good ? launch_float8(p, stream) : kMalformed;
    }
#endif
    default:
      return kMalformed;
  }
}

}  // namespace
}  // namespace fastsr::cuda

using namespace fastsr::cuda;

extern "C" int fastsr_cuda_run(const unsigned char* program, long long bytes, void* const* tensors, int count, int sms,
                               void* stream) {
  Resolver resolve{tensors, count};
  int partials = 0;
  for (long long at = 0; at < bytes;) {
    StepHead head;
    if (bytes - at < static_cast<long long>(sizeof head)) return kMalformed;
    std::memcpy(&head, program + at, sizeof head);
    if (head.bytes < static_cast<int>(sizeof head) || head.bytes > bytes - at) return kMalformed;
    if (const int error = run_step(head, program + at + sizeof head, resolve, sms, stream, partials)) return error;
    at += head.bytes;
  }
  return 0;
}

extern "C" void fastsr_cuda_struct_sizes(int (&sizes)[7]) {
  const int all[7] = {sizeof(ConvParams),   sizeof(GateParams), sizeof(ScaleParams), sizeof(ResidualEParams),
                      sizeof(Float8Params), sizeof(Block),      sizeof(Chunk)};
  std::memcpy(sizes, all, sizeof all);
}

extern "C" void fastsr_cuda_tile(const unsigned char* conv, int sms, int (&tile)[4]) {
  ConvParams p;
  std::memcpy(&p, conv, sizeof p);
  p.partial.data = p.partial.slot >= 0;
  if (p.arch == kSm90) {
    const Sm90Plan s = choose_sm90(p, sms);
    const int all[4] = {s.height, s.stages, s.resident, s.shared_bytes};
    std::memcpy(tile, all, sizeof all);
  } else {
    const Sm80Plan s = choose_sm80(p, sms);
    const int all[4] = {4 * s.warps, s.stages, 0, s.shared_bytes};
    std::memcpy(tile, all, sizeof all);
  }
}
