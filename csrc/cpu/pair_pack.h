// SPDX-License-Identifier: BSD-3-Clause
//
// Numbers of bf16 as the products of pair_product.h take them: rows, transposed rows, pairs.
#pragma once

#if defined(FLASH_CPU_BF16)

#include "cpu/pair_product.h"

namespace flash::cpu {
namespace {

/// The scale of scores in two parts: a power of two that one operand takes without an error, so
/// that q.k overflows no sooner than the score, and the rest. Never above 1, lest the operand
/// itself overflows. What becomes denormal is lost: less than 2^-124 |k| of a score.
struct SplitScale {
  Real of_operand, of_scores;

  static SplitScale of(Real scale) {
    if (scale == 0) return {0, 0};
    int exponent;
    __builtin_frexpf(scale, &exponent);  // 2^(exponent - 1) <= |scale| < 2^exponent
    const Real power = __builtin_ldexpf(1, smaller(larger(exponent - 1, -126), 0));
    return {power, scale / power};
  }
};

/// to[x][i] = the numbers 2x and 2x + 1 of row i, zeros up to whole steps and vectors;
/// (width / 2, pitch). row(i): its numbers.
template <class Row>
FLASH_INLINE void pack_columns(int count, int width, int64_t pitch, Int* to, Row&& row) {
  const auto read = [&](int i, int x, int pairs, Int* line) {  // of zeros
    const int left = smaller(2 * pairs, width - 2 * x);
    std::memcpy(line, row(i) + 2 * x, sizeof(BFloat16) * left);
  };
  transpose_rows(count, round_up(width, kPairDepth) / 2, pitch, to, read);
}
/// Both numbers of each pair times a power of two.
FLASH_NOINLINE void scale_pairs(Real power, int64_t count, Int* pairs) {
  constexpr Bits kHigh = 0xffff0000;
  const Vector factor = splat(power);
  for (int64_t i = 0; i < count; i += kLanes) {
    const BitVector pair = (BitVector)load(pairs + i);
    const BitVector low = bits_of(from_bits(pair << 16) * factor);
    const BitVector high = bits_of(from_bits(pair & kHigh) * factor);
    const BitVector scaled = low >> 16 | (high & kHigh);
    std::memcpy(pairs + i, &scaled, sizeof scaled);
  }
}

/// The same times the operand's part of the scale.
template <class Row>
FLASH_INLINE void pack_scaled_columns(int count, int width, int64_t pitch, Real scale, Int* pairs,
                                      Row&& row) {
  pack_columns(count, width, pitch, pairs, row);
  scale_pairs(SplitScale::of(scale).of_operand, round_up(width, kPairDepth) / 2 * pitch, pairs);
}

/// Rows, padded to whole steps with zeros.
FLASH_NOINLINE void copy_rows(const BFloat16* rows, int64_t stride, int count, int width,
                              BFloat16* to) {
  const int whole = round_up(width, kPairDepth);
  for (int j = 0; j < count; ++j, to += whole, rows += stride) {
    std::memset(to + width, 0, sizeof(BFloat16) * (whole - width));
    std::memcpy(to, rows, sizeof(BFloat16) * width);
  }
}

typedef uint16_t HalfVector __attribute__((vector_size(64)));
constexpr uint16_t kExponent = 0x7f80;  ///< of bf16: all of these bits are set in inf and NaN

/// 32 rows of 8 numbers become 8 rows of 32, `pitch` apart. Returns the largest exponents.
/// Rows i, i + 8, i + 16, i + 24 are the quarters of a vector; three rounds of interleaving in the
/// quarters transpose 8 x 8 numbers in each.
template <bool kLeavesOut>
FLASH_INLINE HalfVector transpose_8(const BFloat16* rows, int64_t stride, BFloat16* to,
                                    int64_t pitch) {
  __m512i x[8];
  HalfVector largest_exponent{};
  FLASH_UNROLL
  for (int i = 0; i < 8; ++i) {
    const auto quarter = [&](int n) {
      __m128i numbers;
      std::memcpy(&numbers, rows + (i + 8 * n) * stride, sizeof numbers);
      return numbers;
    };
    x[i] = _mm512_castsi128_si512(quarter(0));
    x[i] = _mm512_inserti32x4(x[i], quarter(1), 1);
    x[i] = _mm512_inserti32x4(x[i], quarter(2), 2);
    x[i] = _mm512_inserti32x4(x[i], quarter(3), 3);
    const HalfVector exponent = (HalfVector)x[i] & kExponent;
    if constexpr (kLeavesOut) {
      x[i] = (__m512i)(exponent == kExponent ? HalfVector{} : (HalfVector)x[i]);
    }
    largest_exponent = exponent > largest_exponent ? exponent : largest_exponent;
  }
  __m512i y[8], z[8];
  FLASH_UNROLL
  for (int i = 0; i < 4; ++i) {
    y[2 * i] = _mm512_unpacklo_epi16(x[i], x[i + 4]);  // columns 0 ... 3 of rows i and i + 4
    y[2 * i + 1] = _mm512_unpackhi_epi16(x[i], x[i + 4]);
  }
  FLASH_UNROLL
  for (int i = 0; i < 4; ++i) {  // rows i % 2 + 0, 2, 4, 6; columns from 4 (i / 2) on, two each
    const int low = i % 2 * 2 + i / 2;
    z[2 * i] = _mm512_unpacklo_epi16(y[low], y[low + 4]);
    z[2 * i + 1] = _mm512_unpackhi_epi16(y[low], y[low + 4]);
  }
  FLASH_UNROLL
  for (int i = 0; i < 4; ++i) {  // columns 2 i, 2 i + 1
    const int at = i / 2 * 4 + i % 2;
    const __m512i low = _mm512_unpacklo_epi16(z[at], z[at + 2]);
    const __m512i high = _mm512_unpackhi_epi16(z[at], z[at + 2]);
    std::memcpy(to + 2 * i * pitch, &low, sizeof low);
    std::memcpy(to + (2 * i + 1) * pitch, &high, sizeof high);
  }
  return largest_exponent;
}

/// to[c][i] = row i's number c for `count` rows, zeros up to whole steps of rows; (whole strips of
/// 8 columns, pitch). Returns whether all numbers are finite. With kLeavesOut those that are not
/// become 0.
template <bool kLeavesOut>
FLASH_NOINLINE bool transpose_numbers(const BFloat16* from, int64_t stride, int count, int width,
                                      BFloat16* to, int64_t pitch) {
  HalfVector largest_exponent{};
  for (int first = 0; first < count; first += kPairDepth) {
    const int left = smaller(kPairDepth, count - first);
    for (int c = 0; c < width; c += 8) {
      const BFloat16* rows = from + first * stride + c;
      const int columns = smaller(8, width - c);
      BFloat16 padded[kPairDepth][8];
      int64_t row_stride = stride;
      if (left < kPairDepth || columns < 8) {
        std::memset(padded, 0, sizeof padded);
        for (int j = 0; j < left; ++j)
          std::memcpy(padded[j], rows + j * stride, sizeof(BFloat16) * columns);
        rows = padded[0], row_stride = 8;
      }
      const HalfVector exponent =
          transpose_8<kLeavesOut>(rows, row_stride, to + c * pitch + first, pitch);
      largest_exponent = exponent > largest_exponent ? exponent : largest_exponent;
    }
  }
  const BitVector found = (BitVector)(largest_exponent == kExponent);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (found[lane]) return false;
  }
  return true;
}

/// Two vectors rounded to nearest even, as pairs; the first in the low halves.
FLASH_INLINE IntVector rounded_pairs(Vector first, Vector second) {
#if defined(__AVX512BF16__)
  HalfVector from;
  FLASH_UNROLL
  for (int lane = 0; lane < kLanes; ++lane) from[2 * lane] = lane, from[2 * lane + 1] = 16 + lane;
  const HalfVector both = (HalfVector)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (IntVector)__builtin_shuffle(both, from);
#else
  const auto rounded = [](Vector x) {
    const BitVector bits = bits_of(x);
    return bits + 0x7fff + (bits >> 16 & 1);
  };
  const IntVector is_nan = ((first != first) & 0xffff) | (second != second) << 16;
  const BitVector both = rounded(first) >> 16 | (rounded(second) & 0xffff0000);
  return (IntVector)(both | (BitVector)is_nan);
#endif
}

/// 32 numbers of a row, rounded to nearest even.
FLASH_INLINE void store_rounded(Vector first, Vector second, BFloat16* to) {
#if defined(__AVX512BF16__)
  const auto both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  std::memcpy(to, &both, sizeof both);
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    to[lane] = narrow<BFloat16>(first[lane]);
    to[lane + kLanes] = narrow<BFloat16>(second[lane]);
  }
#endif
}

}  // namespace
}  // namespace flash::cpu

#endif
