// What the tests call beside csrc/cuda/program.h.
#include "emulation.h"

// seed: of the order of threads and blocks; an even one lets background work happen late, an odd one at once.
extern "C" void emulation_begin(std::uint64_t seed, int fault) {
  auto& s = emulation::state();
  s.random = seed * 2 + 1;
  s.late = seed % 2 == 0;
  s.fault = fault;
  s.message.clear();
}

extern "C" const char* emulation_message() {
  return emulation::state().message.c_str();
}
