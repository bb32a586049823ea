// Winograd's minimal filtering F(M x M, R x R): M x M outputs of an R x R convolution from A x A inputs, A = M + R - 1,
// with A x A products instead of M x M x R x R.
//
// In one dimension, outputs of a correlation are the transpose of a product of polynomials, which Cook and Toom compute
// by evaluation at A - 1 finite points p and at infinity (the leading coefficient), one product a point, and
// interpolation. For inputs d[A], taps g[R] and outputs y[M]:
//
//   y = Out [(Ker g) * (In d)]             * element by element
//   Ker[p][i] = p^i / prod(p - q), q != p  row of infinity: 0 ... 0 1
//   Out[i][p] = p^i                        column of infinity: 1 in the last row
//   In[p]     = coefficients of prod(x - q), q != p, lowest first; row of infinity: those of prod(x - q) over all q
//
// In two dimensions it is done to the rows and then to the columns. The points decide the rounding error. All of ours
// come in pairs +-a, and zero where their number is odd: then sums and differences of a pair share their terms,
//
//   In[+-a] = odd +- a even,  even and odd: every second coefficient of prod(x^2 - b^2) x^z, b != a, z = 1 with zero.
//
// Ker is applied in double when weights are packed; In and Out are applied here, sixteen channels at once.
#pragma once

#include "cpu/simd.h"

namespace fastsr::cpu {
namespace {
namespace winograd {

// Points, chosen by measuring: 0, +-3/4, +-3/2 has half the error of the textbook's 0, +-1, +-2 at the same cost. A tile of
// odd size is better without zero.
struct Three {
  static constexpr bool kZero = true;
  static constexpr int kPairs = 1;
  static constexpr double kPoints[kPairs] = {1.0};
};
struct Four {
  static constexpr bool kZero = false;
  static constexpr int kPairs = 2;
  static constexpr double kPoints[kPairs] = {0.4, 1.25};
};
struct Five {
  static constexpr bool kZero = true;
  static constexpr int kPairs = 2;
  static constexpr double kPoints[kPairs] = {0.75, 1.5};
};
struct Six {
  static constexpr bool kZero = false;
  static constexpr int kPairs = 3;
  static constexpr double kPoints[kPairs] = {1.0 / 3.0, 1.0, 2.0};
};
struct Seven {
  static constexpr bool kZero = true;
  static constexpr int kPairs = 3;
  static constexpr double kPoints[kPairs] = {0.5, 1.0, 2.0};
};

// Coefficients of prod(t - b^2) over the pairs b, lowest first; without one of them if 0 <= left_out < pairs.
template <class Points>
struct Product {
  double of[Points::kPairs + 1];

  constexpr explicit Product(int left_out) : of{1.0} {
    int degree = 0;
    for (int j = 0; j < Points::kPairs; ++j) {
      if (j == left_out) continue;
      const double square = Points::kPoints[j] * Points::kPoints[j];
      of[degree + 1] = 0.0;
      for (int k = ++degree; k > 0; --k) of[k] = of[k - 1] - square * of[k];
      of[0] *= -square;
    }
  }
};

// factor * x + y, without a multiplication where factor is 1: additions have units of their own. factor is a constant
// after inlining.
FASTSR_INLINE Vec scaled_add(double factor, Vec x, Vec y) {
  if (factor == 1.0) return add(x, y);
  return fma(all(static_cast<float>(factor)), x, y);
}

// With products of bfloat16, a layer's error is about 1e-2 for F(4x4, 3x3), the largest that is allowed.
template <int kM, int kR, class Points>
struct Tile {
  static constexpr bool kBf16 = kR <= 3 && kM <= 4;
  static constexpr int kOutputs = kM, kTaps = kR, kSize = kM + kR - 1, kPositions = kSize * kSize;
  static constexpr int kZero = Points::kZero, kPairs = Points::kPairs;
  static_assert(kSize == 2 * kPairs + kZero + 1, "one finite point less than the tile is wide");
  static constexpr Product<Points> kWhole{-1};
  static constexpr Product<Points> kWithout[3] = {Product<Points>{0}, Product<Points>{1}, Product<Points>{2}};

  // The sum of factors[k] x[2 k] over k = 0 .. top, where factors[top] = 1.
  FASTSR_INLINE Vec polynomial(const Product<Points>& factors, int top, const Vec* x) {
    Vec sum = x[2 * top];
    FASTSR_UNROLL for (int k = top - 1; k >= 0; --k) sum = scaled_add(factors.of[k], x[2 * k], sum);
    return sum;
  }

  // to = In d. Order of points: zero if it is one, then a, -a of every pair, infinity.
  FASTSR_INLINE void input(const Vec (&d)[kSize], Vec (&to)[kSize]) {
    if (kZero) to[0] = polynomial(kWhole, kPairs, d);
    FASTSR_UNROLL for (int i = 0; i < kPairs; ++i) {
      const Vec even = polynomial(kWithout[i], kPairs - 1, d + kZero);
      const Vec odd = polynomial(kWithout[i], kPairs - 1, d + kZero + 1);
      const double a = Points::kPoints[i];
      to[kZero + 2 * i] = scaled_add(a, even, odd);
      to[kZero + 2 * i + 1] = a == 1.0 ? sub(odd, even) : fnma(all(static_cast<float>(a)), even, odd);
    }
    to[kSize - 1] = polynomial(kWhole, kPairs, d + kZero);
  }

  // to = Out m.
  FASTSR_INLINE void output(const Vec (&m)[kSize], Vec (&to)[kOutputs]) {
    Vec sums[kPairs], differences[kPairs];
    FASTSR_UNROLL for (int j = 0; j < kPairs; ++j) {
      sums[j] = add(m[kZero + 2 * j], m[kZero + 2 * j + 1]);
      differences[j] = sub(m[kZero + 2 * j], m[kZero + 2 * j + 1]);
    }
    double powers[kPairs];
    FASTSR_UNROLL for (int j = 0; j < kPairs; ++j) powers[j] = 1.0;
    FASTSR_UNROLL for (int i = 0; i < kOutputs; ++i) {
      const Vec* x = i % 2 == 0 ? sums : differences;
      Vec y;
      int j = 0;
      if (i == kOutputs - 1) {
        y = m[kSize - 1];
      } else {
        y = powers[0] == 1.0 ? x[0] : mul(all(static_cast<float>(powers[0])), x[0]);
        j = 1;
      }
      FASTSR_UNROLL for (; j < kPairs; ++j) y = scaled_add(powers[j], x[j], y);
      if (i == 0 && kZero) y = add(m[0], y);
      to[i] = y;
      FASTSR_UNROLL for (int k = 0; k < kPairs; ++k) powers[k] *= Points::kPoints[k];
    }
  }

  // Ker.
  struct Kernel {
    double of[kSize][kTaps];
  };

  static Kernel kernel() {
    double points[kSize] = {};
    for (int j = 0; j < kPairs; ++j) {
      points[kZero + 2 * j] = Points::kPoints[j];
      points[kZero + 2 * j + 1] = -Points::kPoints[j];
    }
    Kernel k = {};
    for (int p = 0; p < kSize - 1; ++p) {
      double value = 1.0;
      for (int q = 0; q < kSize - 1; ++q) {
        if (q != p) value /= points[p] - points[q];
      }
      for (int i = 0; i < kTaps; ++i, value *= points[p]) k.of[p][i] = value;
    }
    k.of[kSize - 1][kTaps - 1] = 1.0;
    return k;
  }
};

using Tile43 = Tile<4, 3, Five>;
using Tile23 = Tile<2, 3, Three>;
using Tile63 = Tile<6, 3, Seven>;
using Tile25 = Tile<2, 5, Five>;
using Tile35 = Tile<3, 5, Six>;
using Tile42 = Tile<4, 2, Four>;
using Tile32 = Tile<3, 2, Three>;

}  // namespace winograd
}  // namespace
}  // namespace fastsr::cpu
