// The instruction-set levels that CPU kernels are written for, lowest first: a kernel may run where level() is at least
// its own.
#pragma once

namespace fastsr::cpu {

enum class Isa : int {
  kBaseline = 0,    // nothing beyond what the compiler targets by default: eager operators only
  kAvx2 = 1,        // AVX2, FMA, F16C
  kAvx512 = 2,      // the above, AVX-512 F, CD, BW, DQ, VL, and BMI1, BMI2
  kAvx512Bf16 = 3,  // the above and AVX-512 BF16
};

inline constexpr int kIsaCount = 4;

// What this processor has AND this operating system saves on a context switch; found once, then remembered.
Isa detected();

// The level to use: detected(), or a lower one that the environment asks for by FASTSR_CPU_ISA. It is kBaseline where
// the environment asks for what there is not; isa_problem of the library then says so.
Isa level();

const char* name(Isa isa);

}  // namespace fastsr::cpu
