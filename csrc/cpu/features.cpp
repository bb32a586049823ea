// Which instruction-set level may be used at run time. This file is compiled for the baseline, so it runs anywhere.
// Bits: Intel Software Developer's Manual, volume 2A, CPUID; volume 1, section 13.2 (XCR0).
#include "cpu/features.h"

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <cstdlib>
#include <string>

#include "common/check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastsr::cpu {
namespace {

#if defined(__x86_64__)

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero when the processor does not know the leaf: an unknown leaf would repeat the highest known one.
Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

// Written in assembly because the intrinsic would need -mxsave, and with it a processor that has it.
std::uint64_t xcr0() {
  std::uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

constexpr bool all(std::uint64_t value, std::uint64_t bits) {
  return (value & bits) == bits;
}

Isa detect() {
  constexpr unsigned kFma = 1u << 12, kOsxsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;  // leaf 1, ecx
  constexpr unsigned kAvx2Bit = 1u << 5;                                                       // leaf 7.0, ebx
  constexpr unsigned kBmi = 1u << 3, kBmi2 = 1u << 8;
  constexpr unsigned kF = 1u << 16, kDq = 1u << 17, kCd = 1u << 28, kBw = 1u << 30, kVl = 1u << 31;
  constexpr unsigned kBf16 = 1u << 5;                         // leaf 7.1, eax
  constexpr std::uint64_t kYmmState = 0x6, kZmmState = 0xe6;  // XCR0: SSE, AVX; then also opmask and both ZMM parts

  const Registers one = cpuid(1, 0);
  if (!all(one.ecx, kFma | kOsxsave | kAvx | kF16c)) {
    return Isa::kBaseline;  // without OSXSAVE, xgetbv itself would trap
  }
  const std::uint64_t state = xcr0();
  const Registers seven = cpuid(7, 0);
  if (!all(seven.ebx, kAvx2Bit) || !all(state, kYmmState)) {
    return Isa::kBaseline;
  }
  if (!all(seven.ebx, kF | kDq | kCd | kBw | kVl | kBmi | kBmi2) || !all(state, kZmmState)) {
    return Isa::kAvx2;
  }
  // eax of leaf 7.0 is the highest subleaf; asking beyond it returns zeros on Intel but is undefined in general.
  const bool bf16 = seven.eax >= 1 && all(cpuid(7, 1).eax, kBf16);
  return bf16 ? Isa::kAvx512Bf16 : Isa::kAvx512;
}

#else

Isa detect() {
  return Isa::kBaseline;
}

#endif

// FASTSR_CPU_ISA, by which tests run every level that a processor has.
struct Choice {
  Isa level;
  std::string problem;
};

Choice choose() {
  const char* wanted = std::getenv("FASTSR_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    return {detected(), ""};
  }
  std::string known;
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (std::string(wanted) == name(isa)) {
      return isa <= detected() ? Choice{isa, ""}
                               : Choice{Isa::kBaseline, std::string("FASTSR_CPU_ISA asks for ") + wanted +
                                                            ", but this processor or operating system offers " +
                                                            name(detected())};
    }
    known += (i > 0 ? ", " : "") + std::string(name(isa));
  }
  return {Isa::kBaseline, std::string("FASTSR_CPU_ISA: expected one of ") + known + ", got '" + wanted + "'"};
}

const Choice& choice() {
  static const Choice made = choose();
  return made;
}

std::int64_t isa() {
  return static_cast<std::int64_t>(level());
}

std::int64_t isa_detected() {
  return static_cast<std::int64_t>(detected());
}

std::string isa_problem() {
  return choice().problem;
}

std::string isa_name(std::int64_t level) {
  expect(level >= 0 && level < kIsaCount, "fastsr_cpu::isa_name", "level",
         "a level from 0 to " + std::to_string(kIsaCount - 1), level);
  return name(static_cast<Isa>(level));
}

}  // namespace

Isa detected() {
  static const Isa found = detect();
  return found;
}

Isa level() {
  return choice().level;
}

const char* name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kBaseline:
      break;
  }
  return "baseline";
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastsr_cpu, m) {
  m.def("isa() -> int");
  m.def("isa_detected() -> int");
  m.def("isa_problem() -> str");
  m.def("isa_name(int level) -> str");
}

// CompositeExplicitAutograd also serves a call without any tensor, which carries no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(fastsr_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("isa_detected", TORCH_BOX(&isa_detected));
  m.impl("isa_problem", TORCH_BOX(&isa_problem));
  m.impl("isa_name", TORCH_BOX(&isa_name));
}

}  // namespace fastsr::cpu
