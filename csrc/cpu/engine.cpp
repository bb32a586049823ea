// The driver of the CPU engine: packs the weights of convolutions, and walks programs (program.h) over torch's threads.
//
// A program comes from fastsr/_cpu.py, but nothing in it is trusted: sizes, slots and the extent of every map are checked
// against the tensors of the call before a step runs, so that a wrong program is an exception.
//
// Memory held between calls: a calling thread keeps its last workspace if that has at most kWorkspaceKept bytes, and
// every thread that ran a task keeps scratch of at most kScratchKept bytes.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "cpu/conv/conv.h"
#include "cpu/features.h"
#include "cpu/program.h"
#include "cpu/steps/steps.h"

namespace fastsr::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr std::int64_t kWorkspaceKept = std::int64_t{256} << 20;
constexpr std::int64_t kScratchKept = std::int64_t{16} << 20;
constexpr std::int64_t kAlignment = 64;

// Asks for large pages under memory that is written for the first time: a fresh map of a large image would otherwise be a
// fault and a page to clear for every 4 KiB of it, in every call. Where there are none, nothing changes.
void want_large_pages(void* data, std::int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = 4096;
  constexpr std::int64_t kLarge = std::int64_t{4} << 20;
  if (bytes < kLarge) return;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + static_cast<std::uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(data), static_cast<void>(bytes);
#endif
}

// Memory that a thread keeps for the next call.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  // At least so many bytes, their contents undefined; null where there is no more memory.
  void* get(std::int64_t bytes) {
    if (bytes > size_) {
      release();
      data_ = ::operator new(static_cast<std::size_t>(bytes), std::align_val_t{kAlignment}, std::nothrow);
      size_ = data_ != nullptr ? bytes : 0;
      want_large_pages(data_, size_);
    }
    return data_;
  }

  void keep(std::int64_t at_most) {
    if (size_ > at_most) release();
  }

 private:
  void release() {
    ::operator delete(data_, std::align_val_t{kAlignment});
    data_ = nullptr;
    size_ = 0;
  }

  void* data_ = nullptr;
  std::int64_t size_ = 0;
};

thread_local Buffer workspace_of_thread, scratch_of_thread;

// The algorithm of a form at the level in use; null if there is none.
const Algorithm* algorithm(std::int32_t form) {
  const Algorithm *direct = nullptr, *winograd = nullptr;
#if defined(__x86_64__)
  switch (level()) {
    case Isa::kAvx512Bf16:
      direct = kDirectAvx512Bf16, winograd = kWinogradAvx512Bf16;
      break;
    case Isa::kAvx512:
      direct = kDirectAvx512, winograd = kWinogradAvx512;
      break;
    case Isa::kAvx2:
      direct = kDirectAvx2, winograd = kWinogradAvx2;
      break;
    case Isa::kBaseline:
      return nullptr;
  }
#endif
  const Algorithm* found = form < kDirectForms ? direct + form : winograd + (form - kDirectForms);
  return direct == nullptr || found->run == nullptr ? nullptr : found;
}

const StepKernels* step_kernels() {
#if defined(__x86_64__)
  switch (level()) {
    case Isa::kAvx512Bf16:
      return &kStepsAvx512Bf16;
    case Isa::kAvx512:
      return &kStepsAvx512;
    case Isa::kAvx2:
      return &kStepsAvx2;
    case Isa::kBaseline:
      break;
  }
#endif
  return nullptr;
}

std::string no_kernels() {
  return std::string("no CPU kernels are written for the instruction set ") + name(level());
}

constexpr bool within(std::int64_t value, std::int64_t low, std::int64_t high) {
  return low <= value && value <= high;
}

// Why this shape is no convolution that the engine runs here; empty if it is one.
std::string refused(const Shape& s) {
  if (level() == Isa::kBaseline) return no_kernels();
  constexpr std::int32_t kMaxChannels = 1 << 16, kMaxWindow = 64;
  if (!within(s.form, 0, kForms - 1)) return "there is no form " + std::to_string(s.form);
  if (!within(s.sources, 1, kMaxSources)) return "1 to " + std::to_string(kMaxSources) + " sources are read";
  std::int64_t sum = 0;
  for (int i = 0; i < s.sources; ++i) {
    if (!within(s.widths[i], 1, kMaxChannels)) return "a source has " + std::to_string(s.widths[i]) + " channels";
    sum += s.widths[i];
  }
  const bool sized = within(s.cin, 1, kMaxChannels) && within(s.cout, 1, kMaxChannels) && sum == s.cin;
  if (!sized || !within(s.groups, 1, kMaxChannels) || s.cin % s.groups != 0 || s.cout % s.groups != 0) {
    return "sources of " + std::to_string(sum) + " channels for " + std::to_string(s.cin) + " inputs, " +
           std::to_string(s.cout) + " outputs and " + std::to_string(s.groups) + " groups";
  }
  if (!within(s.kernel, 1, kMaxWindow) || !within(s.stride, 1, kMaxWindow) || !within(s.padding, 0, kMaxWindow)) {
    return "kernels and strides from 1 and padding from 0 to " + std::to_string(kMaxWindow) + " are run";
  }
  if (!within(s.upsample, 1, kMaxWindow) || !within(s.shuffle, 1, kMaxWindow) ||
      s.cout % (s.shuffle * s.shuffle) != 0) {
    return "upsampling by " + std::to_string(s.upsample) + " and a shuffle by " + std::to_string(s.shuffle);
  }
  if (s.bf16_products && level() != Isa::kAvx512Bf16) {
    return std::string("bfloat16 products need avx512_bf16; this is ") + name(level());
  }
  const Algorithm* found = algorithm(s.form);
  if (found == nullptr) return "form " + std::to_string(s.form) + " is not built for " + name(level());
  const char* reason = found->refuse(s);
  return reason == nullptr ? "" : reason;
}

// The struct that a tensor of bytes holds.
template <typename Struct>
Struct from_bytes(const char* op, const char* argument, const Tensor& bytes) {
  const bool holds = bytes.scalar_type() == ScalarType::Byte && bytes.is_contiguous() &&
                     bytes.numel() == static_cast<std::int64_t>(sizeof(Struct));
  if (!holds) {
    fail(op, argument, "a contiguous uint8 tensor of " + std::to_string(sizeof(Struct)) + " elements",
         std::to_string(bytes.numel()) + " elements of another kind or count");
  }
  Struct made;
  std::memcpy(&made, bytes.const_data_ptr(), sizeof(Struct));
  return made;
}

std::string refuse(Tensor shape) {
  return refused(from_bytes<Shape>("fastsr_cpu::refuse", "shape", shape));
}

const float* floats(const char* argument, const Tensor& t, std::int64_t count) {
  constexpr const char* kOp = "fastsr_cpu::pack";
  expect(t.scalar_type() == ScalarType::Float && t.is_contiguous(), kOp, argument, "contiguous float32",
         "another type or layout");
  if (t.numel() != count) fail(kOp, argument, std::to_string(count) + " elements", t.numel());
  return static_cast<const float*>(t.const_data_ptr());
}

Tensor pack(Tensor shape, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> slope,
            std::optional<Tensor> pre_scale, std::optional<Tensor> pre_shift) {
  constexpr const char* kOp = "fastsr_cpu::pack";
  const Shape s = from_bytes<Shape>(kOp, "shape", shape);
  const std::string reason = refused(s);
  if (!reason.empty()) fail(kOp, "shape", "a convolution that refuse() has nothing against", reason);
  if (!s.has_pre && (pre_scale || pre_shift)) fail(kOp, "pre_scale", "nothing, as shape.has_pre is 0", "a tensor");
  const auto values = [](const char* argument, const std::optional<Tensor>& t, std::int64_t count) {
    return t ? floats(argument, *t, count) : nullptr;
  };
  const std::int64_t taps = std::int64_t{s.kernel} * s.kernel;
  const float* w = floats("weight", weight, std::int64_t{s.cin} * s.cout / s.groups * taps);
  const Algorithm& found = *algorithm(s.form);
  const std::int64_t bytes = found.packed_bytes(s);
  Tensor packed = torch::stable::empty({bytes}, ScalarType::Byte);
  found.pack(s, w, values("bias", bias, s.cout), values("slope", slope, s.cout), values("pre_scale", pre_scale, s.cin),
             values("pre_shift", pre_shift, s.cin), packed.mutable_data_ptr());
  return packed;
}

// Runs tasks 0 .. tasks - 1 on torch's threads, each with scratch of its thread.
template <typename Run>
void run_tasks(std::int64_t tasks, std::int64_t scratch, int threads, const Run& run) {
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> starved{false};
  const auto worker = [&](std::int64_t, std::int64_t) {
    void* memory = nullptr;
    if (scratch > 0 && (memory = scratch_of_thread.get(scratch)) == nullptr) {
      starved = true;
      return;
    }
    for (std::int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run(task, memory);
    scratch_of_thread.keep(kScratchKept);
  };
  const std::int64_t workers = tasks < threads ? tasks : threads;
  if (workers <= 1) {
    worker(0, 1);
  } else {
    torch::stable::parallel_for(0, workers, 1, worker);
  }
  if (starved) throw std::runtime_error("fastsr_cpu::run: no memory for " + std::to_string(scratch) + " bytes of scratch");
}

// One walk over a program.
class Walk {
 public:
  Walk(const char* op, const std::vector<Tensor>& tensors, const Tensor& program) : op_(op) {
    const bool holds = program.scalar_type() == ScalarType::Byte && program.is_contiguous();
    expect(holds, op_, "program", "contiguous uint8", "another type or layout");
    at_ = static_cast<const char*>(program.const_data_ptr());
    end_ = at_ + program.numel();
    header_ = take<Program>();
    if (header_.steps < 0 || header_.workspace_bytes < 0) wrong("a header of sizes", "negative ones");
    slots_.reserve(tensors.size());
    for (const Tensor& t : tensors) slots_.push_back(slot_of(t));
    if (!slots_.empty()) want_large_pages(slots_[0].data, slots_[0].bytes);  // the result
    kernels_ = step_kernels();
    if (kernels_ == nullptr) throw std::runtime_error(std::string(op_) + ": " + no_kernels());
    threads_ = static_cast<int>(torch::stable::get_num_threads());
    workspace_ = {nullptr, header_.workspace_bytes, kBytes};
    if (header_.workspace_bytes > 0) {
      workspace_.data = static_cast<char*>(workspace_of_thread.get(header_.workspace_bytes));
      if (workspace_.data == nullptr) {
        throw std::runtime_error(std::string(op_) + ": no memory for a workspace of " +
                                 std::to_string(header_.workspace_bytes) + " bytes");
      }
    }
  }

  ~Walk() { workspace_of_thread.keep(kWorkspaceKept); }

  // Adds the seconds of each step to `seconds`, if given.
  void run(std::vector<double>* seconds) {
    using Clock = std::chrono::steady_clock;
    for (step_ = 0; step_ < header_.steps; ++step_) {
      const Clock::time_point start = seconds != nullptr ? Clock::now() : Clock::time_point();
      one(take<Step>());
      if (seconds != nullptr) seconds->push_back(std::chrono::duration<double>(Clock::now() - start).count());
    }
    if (at_ != end_) wrong("nothing after the last step", std::to_string(end_ - at_) + " bytes");
  }

 private:
  static constexpr std::int32_t kBytes = -1;  // holds what a map says

  struct Slot {
    char* data;
    std::int64_t bytes;
    std::int32_t type;
  };

  static Slot slot_of(const Tensor& t) {
    std::int64_t storage = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &storage));
    std::int32_t dtype = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
    static const std::int32_t kFloat32 = aoti_torch_dtype_float32(), kBfloat16 = aoti_torch_dtype_bfloat16();
    const std::int64_t width = static_cast<std::int64_t>(aoti_torch_dtype_element_size(dtype));
    const std::int32_t type = dtype == kFloat32 ? kFloat : dtype == kBfloat16 ? kBf16 : kBytes;
    return {static_cast<char*>(t.data_ptr()), storage - t.storage_offset() * width, type};
  }

  [[noreturn]] void wrong(const std::string& expected, const std::string& got) const {
    fail(op_, "program", (step_ < 0 ? "" : "in step " + std::to_string(step_) + " ") + expected, got);
  }

  void require(bool holds, const char* expected) const {
    if (!holds) wrong(expected, "something else");
  }

  template <typename Struct>
  Struct take() {
    if (end_ - at_ < static_cast<std::int64_t>(sizeof(Struct))) wrong("a whole struct", "the end of the program");
    Struct taken;
    std::memcpy(&taken, at_, sizeof(Struct));
    at_ += sizeof(Struct);
    return taken;
  }

  template <typename Body>
  Body body(const Step& step) {
    if (step.bytes != static_cast<std::int32_t>(sizeof(Body))) {
      wrong("a body of " + std::to_string(sizeof(Body)) + " bytes", std::to_string(step.bytes));
    }
    return take<Body>();
  }

  // The address of `bytes` bytes at an offset into a slot; 0 for what is absent.
  std::int64_t address(const char* what, std::int32_t slot, std::int64_t offset, __int128 bytes, std::int64_t align,
                       std::int32_t type) const {
    if (slot == kAbsent) return 0;
    if (slot != kWorkspace && !within(slot, 0, static_cast<std::int64_t>(slots_.size()) - 1)) {
      wrong(std::string(what) + " in one of " + std::to_string(slots_.size()) + " tensors", "slot " + std::to_string(slot));
    }
    const Slot& s = slot == kWorkspace ? workspace_ : slots_[static_cast<std::size_t>(slot)];
    if (offset < 0 || offset + bytes > s.bytes) {
      wrong(std::string(what) + " within the " + std::to_string(s.bytes) + " bytes of slot " + std::to_string(slot),
            std::to_string(static_cast<std::int64_t>(bytes)) + " bytes at " + std::to_string(offset));
    }
    if (type != kBytes && s.type != kBytes && type != s.type) {
      wrong(std::string(what) + " of the type of slot " + std::to_string(slot), type == kFloat ? "float32" : "bfloat16");
    }
    const std::int64_t found = reinterpret_cast<std::int64_t>(s.data) + offset;
    if (found % align != 0) wrong(std::string(what) + " aligned to " + std::to_string(align) + " bytes", "another address");
    return found;
  }

  // Exchanges the place of a map of this size for its address.
  void resolve(const char* what, Map& m, std::int64_t n, std::int64_t height, std::int64_t width,
               std::int64_t channels) const {
    if (m.slot == kAbsent) {
      m.data = 0;
      return;
    }
    if (m.type != kFloat && m.type != kBf16) wrong(std::string(what) + " of a known type", std::to_string(m.type));
    if (m.channels != channels) {
      wrong(std::string(what) + " of " + std::to_string(channels) + " channels", std::to_string(m.channels));
    }
    if (m.image < 0 || m.row < 0 || m.pixel < 0) wrong(std::string(what) + " with strides from 0", "a negative one");
    const __int128 last = static_cast<__int128>(n - 1) * m.image + static_cast<__int128>(height - 1) * m.row +
                          static_cast<__int128>(width - 1) * m.pixel + channels;
    const std::int64_t element = m.type == kFloat ? 4 : 2;
    m.data = address(what, m.slot, m.data, last * element, element, m.type);
  }

  void resolve(const char* what, Strided& m, std::int64_t n, std::int64_t channels, std::int64_t height,
               std::int64_t width) const {
    if (m.type != kFloat && m.type != kBf16) wrong(std::string(what) + " of a known type", std::to_string(m.type));
    if (m.image < 0 || m.channel < 0 || m.row < 0 || m.pixel < 0) {
      wrong(std::string(what) + " with strides from 0", "a negative one");
    }
    const __int128 last = static_cast<__int128>(n - 1) * m.image + static_cast<__int128>(channels - 1) * m.channel +
                          static_cast<__int128>(height - 1) * m.row + static_cast<__int128>(width - 1) * m.pixel + 1;
    const std::int64_t element = m.type == kFloat ? 4 : 2;
    m.data = address(what, m.slot, m.data, last * element, element, m.type);
    present(what, m.data);
  }

  void resolve(const char* what, Floats& f, std::int64_t count) const {
    f.data = address(what, f.slot, f.data, static_cast<__int128>(count) * 4, 4, kFloat);
  }

  void present(const char* what, std::int64_t data) const {
    if (data == 0) wrong(what, "none");
  }

  // Sizes that every product below stays far from overflow with.
  void sized(std::initializer_list<std::int64_t> sizes) const {
    for (const std::int64_t size : sizes) require(within(size, 1, std::int64_t{1} << 31), "sizes from 1 to 2^31");
  }

  void one(const Step& step) {
    switch (step.kind) {
      case kConvStep:
        return conv(body<Conv>(step));
      case kCopyStep:
        return copy(body<Copy>(step));
      case kSumsStep:
        return sums(body<Sums>(step));
      case kGateStep:
        return gate(body<Gate>(step));
      case kMeanStep:
        return mean(body<Mean>(step));
      case kScaleStep:
        return scale(body<Scale>(step));
    }
    wrong("a kind of step", std::to_string(step.kind));
  }

  template <typename Body>
  void run_step(const StepKernel<Body>& kernel, const Body& body) const {
    run_tasks(kernel.tasks(body), kernel.scratch(body), threads_,
              [&](std::int64_t task, void* scratch) { kernel.run(body, task, scratch); });
  }

  void conv(Conv c) {
    const Shape& s = c.shape;
    const std::string reason = refused(s);
    if (!reason.empty()) wrong("a convolution that can be run", reason);
    sized({c.n, c.height, c.width, c.out_height, c.out_width});
    const auto out_size = [&](std::int64_t in) {
      const std::int64_t read = in * s.upsample;
      return s.transposed ? (read - 1) * s.stride - 2 * s.padding + s.kernel
             : read + 2 * s.padding < s.kernel ? 0 : (read + 2 * s.padding - s.kernel) / s.stride + 1;
    };
    require(c.out_height == out_size(c.height) && c.out_width == out_size(c.width), "the output size of the shape");
    require(within(c.act, kNone, kLeaky), "a known activation");
    require(within(c.skips, 0, 2), "up to two skips");
    const std::int64_t channels = s.cout / (s.shuffle * s.shuffle);
    const std::int64_t height = c.out_height * s.shuffle, width = c.out_width * s.shuffle;

    const Algorithm& found = *algorithm(s.form);
    c.packed.data = address("packed weights", c.packed.slot, c.packed.data, found.packed_bytes(s), kAlignment, kBytes);
    present("packed weights", c.packed.data);
    for (int i = 0; i < s.sources; ++i) {
      resolve("a source", c.in[i], c.n, c.height, c.width, s.widths[i]);
      present("a source", c.in[i].data);
    }
    const auto like_out = [&](const char* what, Map& m) { resolve(what, m, c.n, height, width, channels); };
    like_out("the output", c.out);
    present("the output", c.out.data);
    if (c.skips > 0) {
      require(c.skips == 1 || within(c.skip[0].channels, 1, channels - 1), "two skips that share the channels");
      const std::int64_t held = c.skips == 1 ? channels : c.skip[0].channels;
      resolve("the skip", c.skip[0], c.n, height, width, held);
      present("the skip", c.skip[0].data);
      if (c.skips == 2) {
        resolve("the second skip", c.skip[1], c.n, height, width, channels - held);
        present("the second skip", c.skip[1].data);
      }
    }
    like_out("the factor", c.factor);
    like_out("the term", c.term);
    require((c.factor.data == 0) == (c.term.data == 0), "a factor and a term, or neither");
    like_out("the outer map", c.outer);
    resolve("the scale", c.scale, c.n, 1, 1, s.cout);
    require(c.scale.data == 0 || c.scale.type == kFloat, "a scale of floats");

    const Plan plan = found.plan(c, threads_);
    if (c.partial.slot != kAbsent) {
      const std::int64_t padded = (s.cout + kBlock - 1) / kBlock * kBlock;
      require(s.shuffle == 1 && plan.partials > 0, "a form that can make sums, and no shuffle");
      require(c.partial.type == kFloat && c.partial.row == padded, "partial sums in rows of floats, whole blocks long");
      resolve("the partial sums", c.partial, c.n, plan.partials, 1, padded);
    } else {
      c.partial.data = 0;
    }
    run_tasks(plan.tasks, plan.scratch, threads_,
              [&](std::int64_t task, void* scratch) { found.run(c, plan, task, scratch); });
  }

  void copy(Copy c) {
    sized({c.n, c.channels, c.height, c.width});
    resolve("the map to copy", c.from, c.n, c.channels, c.height, c.width);
    resolve("the copy", c.to, c.n, c.channels, c.height, c.width);
    run_step(kernels_->copy, c);
  }

  void sums(Sums s) {
    const std::int64_t channels = s.in.channels, padded = (channels + kBlock - 1) / kBlock * kBlock;
    sized({s.n, s.height, s.width, s.rows, channels});
    resolve("the map", s.in, s.n, s.height, s.width, channels);
    present("the map", s.in.data);
    require(s.partial.type == kFloat && s.partial.row == padded, "partial sums in rows of floats, whole blocks long");
    resolve("the partial sums", s.partial, s.n, s.rows, 1, padded);
    present("the partial sums", s.partial.data);
    resolve("the sums", s.out, s.n * channels * 9);
    present("the sums", s.out.data);
    run_step(kernels_->sums, s);
  }

  void gate(Gate g) {
    sized({g.n, g.inputs, g.outputs, g.hidden, g.taps, g.pixels});
    require(g.inputs < (1 << 16) && g.outputs < (1 << 16) && g.hidden < (1 << 16) && g.taps <= 9, "a gate of usual sizes");
    resolve("the sums", g.sums, g.n * g.inputs * g.taps);
    present("the sums", g.sums.data);
    resolve("the weight", g.weight, g.outputs * g.inputs * g.taps);
    require(g.weight.data != 0 || (g.inputs == g.outputs && g.taps == 1), "a weight, or as many means as outputs");
    resolve("the bias", g.bias, g.outputs);
    resolve("down_weight", g.down_weight, g.hidden * g.outputs);
    present("down_weight", g.down_weight.data);
    resolve("down_bias", g.down_bias, g.hidden);
    present("down_bias", g.down_bias.data);
    resolve("up_weight", g.up_weight, g.outputs * g.hidden);
    present("up_weight", g.up_weight.data);
    resolve("up_bias", g.up_bias, g.outputs);
    present("up_bias", g.up_bias.data);
    resolve("the gate", g.out, g.n * g.outputs);
    present("the gate", g.out.data);
    run_step(kernels_->gate, g);
  }

  void mean(Mean m) {
    sized({m.n, m.height, m.width, m.in.channels});
    resolve("the map", m.in, m.n, m.height, m.width, m.in.channels);
    present("the map", m.in.data);
    resolve("the means", m.out, m.n * m.in.channels);
    present("the means", m.out.data);
    run_step(kernels_->mean, m);
  }

  void scale(Scale s) {
    sized({s.n, s.height, s.width, s.in.channels});
    resolve("the map", s.in, s.n, s.height, s.width, s.in.channels);
    present("the map", s.in.data);
    resolve("the scale", s.scale, s.n * s.in.channels);
    present("the scale", s.scale.data);
    resolve("the scaled map", s.out, s.n, s.height, s.width, s.in.channels);
    present("the scaled map", s.out.data);
    run_step(kernels_->scale, s);
  }

  const char* op_;
  const char *at_, *end_;
  Program header_;
  std::int64_t step_ = -1;
  std::vector<Slot> slots_;
  Slot workspace_;
  const StepKernels* kernels_;
  int threads_;
};

void run(std::vector<Tensor> tensors, Tensor program) {
  Walk("fastsr_cpu::run", tensors, program).run(nullptr);
}

std::vector<double> profile(std::vector<Tensor> tensors, Tensor program) {
  std::vector<double> seconds;
  Walk("fastsr_cpu::profile", tensors, program).run(&seconds);
  return seconds;
}

std::int64_t partials(Tensor conv) {
  constexpr const char* kOp = "fastsr_cpu::partials";
  const Conv c = from_bytes<Conv>(kOp, "conv", conv);
  const std::string reason = refused(c.shape);
  if (!reason.empty()) fail(kOp, "conv", "a convolution that refuse() has nothing against", reason);
  return algorithm(c.shape.form)->plan(c, 1).partials;
}

// Floating-point operations a second of torch's threads, in units of 10^9: the best of many short runs, as other programs
// may take the processor away from some. Kinds: 0 float32, 1 products of bfloat16.
double peak(std::int64_t kind) {
  constexpr const char* kOp = "fastsr_cpu::peak";
  expect(within(kind, 0, 1), kOp, "kind", "0 (float32) or 1 (bfloat16)", kind);
  const StepKernels* kernels = step_kernels();
  const auto run = kernels == nullptr ? nullptr : kind == 0 ? kernels->peak_fma : kernels->peak_bf16;
  if (run == nullptr) fail(kOp, "kind", "arithmetic that the instruction set has", name(level()));
  constexpr int kRuns = 200;
  constexpr std::int64_t kPasses = 100000;  // about half a millisecond
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  double best = 0.0;
  for (int i = 0; i < kRuns; ++i) {
    using Clock = std::chrono::steady_clock;
    const Clock::time_point start = Clock::now();
    std::atomic<std::int64_t> sum{0};
    torch::stable::parallel_for(0, threads, 1, [&](std::int64_t begin, std::int64_t end) {
      for (; begin < end; ++begin) sum += static_cast<std::int64_t>(run(kPasses));
    });
    const double rate = static_cast<double>(sum) / std::chrono::duration<double>(Clock::now() - start).count();
    best = rate > best ? rate : best;
  }
  return best * 1e-9;
}

// Every byte counts and so does its place: each step is a bijection of the running value and of the word it takes in.
std::int64_t checksum(Tensor x) {
  constexpr std::uint64_t kFactor = 0x9e3779b97f4a7c15u;  // 2^64 over the golden ratio, odd
  std::int64_t elements = x.numel() > 0 ? 1 : 0;
  for (std::int64_t d = 0; d < x.dim() && elements > 0; ++d) elements += (x.size(d) - 1) * x.stride(d);
  const std::int64_t bytes = elements * static_cast<std::int64_t>(x.element_size());
  const char* data = static_cast<const char*>(x.const_data_ptr());
  const auto word = [&](std::int64_t i) {
    std::uint64_t w = 0;
    std::memcpy(&w, data + 8 * i, static_cast<std::size_t>(bytes - 8 * i < 8 ? bytes - 8 * i : 8));
    return w;
  };
  const auto take = [](std::uint64_t& sum, std::uint64_t w) {
    sum = (sum ^ w) * kFactor;
    sum ^= sum >> 32;
  };
  std::uint64_t lanes[8] = {1, 2, 3, 4, 5, 6, 7, 8};  // eight chains, as each waits for its multiplication
  std::int64_t i = 0;
  for (; 8 * (i + 8) <= bytes; i += 8) {
    for (int k = 0; k < 8; ++k) {
      std::uint64_t w;
      std::memcpy(&w, data + 8 * (i + k), 8);
      take(lanes[k], w);
    }
  }
  std::uint64_t sum = static_cast<std::uint64_t>(bytes);
  for (; 8 * i < bytes; ++i) take(sum, word(i));
  for (const std::uint64_t lane : lanes) take(sum, lane);
  return static_cast<std::int64_t>(sum);
}

std::vector<std::int64_t> struct_sizes() {
  return {sizeof(Map),     sizeof(Shape),  sizeof(Conv), sizeof(Program), sizeof(Step), sizeof(Strided),
          sizeof(Floats),  sizeof(Copy),   sizeof(Sums), sizeof(Gate),    sizeof(Mean), sizeof(Scale)};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastsr_cpu, m) {
  m.def("refuse(Tensor shape) -> str");
  m.def(
      "pack(Tensor shape, Tensor weight, Tensor? bias, Tensor? slope, Tensor? pre_scale, Tensor? pre_shift) -> Tensor");
  m.def("partials(Tensor conv) -> int");
  m.def("run(Tensor(a!)[] tensors, Tensor program) -> ()");
  m.def("profile(Tensor(a!)[] tensors, Tensor program) -> float[]");
  m.def("checksum(Tensor x) -> int");
  m.def("peak(int kind) -> float");
  m.def("struct_sizes() -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastsr_cpu, CPU, m) {
  m.impl("refuse", TORCH_BOX(&refuse));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("partials", TORCH_BOX(&partials));
  m.impl("run", TORCH_BOX(&run));
  m.impl("profile", TORCH_BOX(&profile));
  m.impl("checksum", TORCH_BOX(&checksum));
}

STABLE_TORCH_LIBRARY_IMPL(fastsr_cpu, CompositeExplicitAutograd, m) {
  m.impl("peak", TORCH_BOX(&peak));
  m.impl("struct_sizes", TORCH_BOX(&struct_sizes));
}

}  // namespace
}  // namespace fastsr::cpu
