// The leaves of the CUDA engine: checks, the current stream, and one call of fastsr_cuda_run.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/check.h"
#include "cuda/program.h"

// In libtorch_cuda; weak, so that this library also loads where torch has no CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(std::int32_t, void**) __attribute__((weak));

namespace fastsr::cuda {
namespace {

using torch::stable::Tensor;

constexpr const char* kRun = "fastsr_cuda::run";

std::string meaning(int code) {
  switch (code) {
    case kDoesNotFit:
      return "a convolution whose tiles do not fit into shared memory";
    case -2:
      return "a malformed program";
    case -3:
      return "a program for a main loop that this library was built without (FASTSR_CUDA_ARCHS)";
    default:
      return "CUDA error " + std::to_string(code);
  }
}

// tensors: what the program's slots name, at least one; all on one CUDA device. program: uint8, on the CPU.
void run(std::vector<Tensor> tensors, Tensor program, std::int64_t multiprocessors) {
  expect(!tensors.empty(), kRun, "tensors", "at least one tensor", tensors.size());
  const std::int32_t device = tensors[0].get_device_index();
  std::vector<void*> addresses;
  for (const Tensor& t : tensors) {
    expect(t.is_cuda() && t.get_device_index() == device, kRun, "tensors", "CUDA tensors of one device",
           "one on another");
    addresses.push_back(t.data_ptr());
  }
  expect(!program.is_cuda() && program.is_contiguous(), kRun, "program", "a contiguous tensor on the CPU", "another");
  expect(aoti_torch_get_current_cuda_stream != nullptr, kRun, "tensors", "a torch with CUDA", "one without");
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  expect(aoti_torch_get_current_cuda_stream(device, &stream) == 0, kRun, "tensors", "a current stream", "none");
  const auto* code = static_cast<const unsigned char*>(program.data_ptr());
  const int error = fastsr_cuda_run(code, program.numel(), addresses.data(), static_cast<int>(addresses.size()),
                                    static_cast<int>(multiprocessors), stream);
  expect(error == 0, kRun, "program", "a program that can be launched", meaning(error));
}

bool has_sm90() {
#ifdef FASTSR_SM90
  return true;
#else
  return false;
#endif
}

std::vector<std::int64_t> struct_sizes() {
  int sizes[7];
  fastsr_cuda_struct_sizes(sizes);
  return {sizes, sizes + 7};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastsr_cuda, m) {
  m.def("run(Tensor(a!)[] tensors, Tensor program, int multiprocessors) -> ()");
  m.def("has_sm90() -> bool");
  m.def("struct_sizes() -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastsr_cuda, CUDA, m) {
  m.impl("run", TORCH_BOX(&run));
}

// CompositeExplicitAutograd also serves a call without any tensor, which carries no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(fastsr_cuda, CompositeExplicitAutograd, m) {
  m.impl("has_sm90", TORCH_BOX(&has_sm90));
  m.impl("struct_sizes", TORCH_BOX(&struct_sizes));
}

}  // namespace fastsr::cuda
