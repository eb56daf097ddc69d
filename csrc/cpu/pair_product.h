// SPDX-License-Identifier: BSD-3-Clause
//
// The products of bf16 objects, in pairs of numbers:
//     out[r][.] = sum_x A[r][2x] B[2x][.] + A[r][2x + 1] B[2x + 1][.]
// A lies row by row; B "in pairs", row x the numbers 2x and 2x + 1 of every column. Sums are fp32.
// The instruction is one of the processor's: a tile register's (amx.h), or AVX-512's for one row,
// vdpbf16ps, with as many multiplications again as an fma of floats has. Either counts denormal
// numbers as 0. The depth of a product is a multiple of kPairDepth: whoever has less pads both
// sides with zeros, for 0 times what lies behind might be NaN.
#pragma once

#if defined(FLASH_CPU_BF16)

#include "cpu/amx.h"
#include "cpu/element.h"

namespace flash::cpu {
namespace {

static_assert(kLanes == 16 && sizeof(Real) == 4, "a vector is a row of a tile");
static_assert(kBlockKeys % kPairDepth == 0);

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

struct PairScope {
  PairScope() {}  // a scope, to the compiler
};
constexpr int kStripRows = 8;

/// kStripRows x kVectors accumulators, kVectors operands, one broadcast: the registers of tile.h.
template <int kVectors, bool kAdds>
FLASH_INLINE void multiply_strip(const BFloat16* a, int64_t a_stride, const Int* pairs,
                                 int64_t pitch, int steps, float* out, int64_t out_pitch) {
  Vector acc[kStripRows][kVectors];
  FLASH_UNROLL
  for (int r = 0; r < kStripRows; ++r) {
    FLASH_UNROLL
    for (int v = 0; v < kVectors; ++v)
      acc[r][v] = kAdds ? load(out + r * out_pitch + v * kLanes) : splat(0);
  }
#pragma GCC unroll 2
  for (int x = 0; x < steps * kPairDepth / 2; ++x) {
    IntVector b[kVectors];
    FLASH_UNROLL
    for (int v = 0; v < kVectors; ++v) b[v] = load(pairs + x * pitch + v * kLanes);
    FLASH_UNROLL
    for (int r = 0; r < kStripRows; ++r) {
      Int pair;
      std::memcpy(&pair, a + r * a_stride + 2 * x, sizeof pair);
      const IntVector left = IntVector{} + pair;
      FLASH_UNROLL
      for (int v = 0; v < kVectors; ++v)
        acc[r][v] = (Vector)_mm512_dpbf16_ps((__m512)acc[r][v], (__m512bh)left, (__m512bh)b[v]);
    }
  }
  FLASH_UNROLL
  for (int r = 0; r < kStripRows; ++r) {
    FLASH_UNROLL
    for (int v = 0; v < kVectors; ++v) store(out + r * out_pitch + v * kLanes, acc[r][v]);
  }
}

/// out = A B, or out += A B with kAdds, for kVectors vectors of columns. `a_stride` and the pitches
/// are numbers from one row to the next. Rows are computed in strips, of 16 at most: the last strip
/// of A and out must be there.
template <int kVectors, bool kAdds = false>
FLASH_INLINE void multiply_pairs(const BFloat16* a, int64_t a_stride, int rows, const Int* pairs,
                                 int64_t pitch, int steps, float* out, int64_t out_pitch) {
  for (int r = 0; r < rows; r += kStripRows)
    multiply_strip<kVectors, kAdds>(a + r * a_stride, a_stride, pairs, pitch, steps,
                                    out + r * out_pitch, out_pitch);
}

#else

using PairScope = TileScope;

template <int kVectors, bool kAdds = false>
FLASH_INLINE void multiply_pairs(const BFloat16* a, int64_t a_stride, int rows, const Int* pairs,
                                 int64_t pitch, int steps, float* out, int64_t out_pitch) {
  const auto* left = reinterpret_cast<const char*>(a);
  const auto* right = reinterpret_cast<const char*>(pairs);
  int r = 0;
  for (; r + 16 < rows; r += 32)
    multiply_strips<2, kVectors, kAdds>(left + r * a_stride * 2, a_stride * 2, right, pitch, steps,
                                        out + r * out_pitch, out_pitch);
  if (r < rows)
    multiply_strips<1, kVectors, kAdds>(left + r * a_stride * 2, a_stride * 2, right, pitch, steps,
                                        out + r * out_pitch, out_pitch);
}

#endif

}  // namespace
}  // namespace flash::cpu

#endif
