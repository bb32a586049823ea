// Memory that will be needed soon, fetched into the caches while the processor multiplies: products leave the
// path to memory idle, and everything before and after them would otherwise wait for it. Lines are fetched one by one
// between products, as a processor can wait for few at a time and waits itself when there are more.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/simd.h"

namespace fastsr::cpu {
namespace {

struct Ahead {
  static constexpr int kMostRuns = 2048;
  static constexpr std::int64_t kLine = 64;

  struct Run {
    const char *at, *end;
  };

  // A copy of its own keeps it in registers.
  struct Cursor {
    const char *at, *end;  // what is left of the current run
    const Run *next, *last;

    __attribute__((always_inline)) void fetch(std::int64_t count) {
      for (; count > 0; --count) {
        _mm_prefetch(at, _MM_HINT_T0);
        at += kLine;
        if (at >= end) {
          at = next->at;
          end = next->end;
          next += next < last;
        }
      }
    }
  };

  std::int64_t lines;  // in the list
  int runs;
  Cursor cursor;
  Run run[kMostRuns + 1];

  void clear() {
    lines = 0;
    runs = 0;
  }

  // `count` pieces of `bytes` bytes, `stride` bytes apart. What does not fit is fetched when it is needed.
  void add(const char* first, std::int64_t bytes, std::int64_t count, std::int64_t stride) {
    if (bytes <= 0 || count <= 0) return;
    if (stride == bytes) {
      bytes *= count;
      count = 1;
    }
    for (std::int64_t i = 0; i < count && runs < kMostRuns; ++i, first += stride) {
      run[runs++] = {first, first + bytes};
      lines += (bytes + kLine - 1) / kLine;
    }
  }

  // To the begin of the list. Behind it, its last line is fetched again and again.
  void begin() {
    run[runs] = runs > 0 ? Run{run[runs - 1].at, run[runs - 1].at} : Run{nullptr, nullptr};
    cursor = {run[0].at, run[0].end, run + (runs > 0), run + runs};
  }
};

}  // namespace
}  // namespace fastsr::cpu
