// SPDX-License-Identifier: BSD-3-Clause
//
// The two products of a block for bf16, by tile registers (amx.h); lanes are queries, as in tile.h:
//     S^T = scale K Q^T       A = K where it lies         B = Q in pairs of columns
//     O^T = alpha O^T + V^T P^T       A = V^T, packed once a block    B = P in pairs of keys
// Weights are rounded to bf16 for the product; row sums add them as they are. What is narrower than
// a tile is padded with zeros, the keys of a block above all: 0 times what lies behind them might
// be NaN. Only for objects that define FLASH_CPU_AMX, with AVX-512.
#pragma once

#if defined(FLASH_CPU_AMX)

#include "cpu/amx.h"
#include "cpu/score.h"

namespace flash::cpu {
namespace {

static_assert(kLanes == 16 && sizeof(Real) == 4, "a vector is a row of a tile");
static_assert(kBlockKeys % kTileDepth == 0);

/// A block of K and V of one head, as the tiles take it.
struct TileBlock {
  const BFloat16* k;    ///< (whole strips of keys, whole steps of head_dim)
  int64_t k_stride;     ///< of a row
  const BFloat16* v_t;  ///< (whole strips of head_dim_v, kBlockKeys): 0 behind the last key
  Rows v;               ///< widened where a value is not finite, else only its count and width
  int head_dim;
  Real scale;

  int count() const { return v.count; }
  bool has_finite_values() const { return !v.data; }
};

/// The scale of scores in two parts: a power of two that Q takes without an error, so that q.k
/// overflows no sooner than the score, and the rest. Never above 1, lest Q itself overflows, nor so
/// small that it loses numbers.
struct SplitScale {
  Real of_queries, of_scores;

  static SplitScale of(Real scale) {
    int exponent = 0;
    __builtin_frexpf(scale, &exponent);  // 2^(exponent - 1) <= |scale| < 2^exponent
    const Real power = __builtin_ldexpf(1, smaller(larger(exponent - 1, -24), 0));
    return {power, scale / power};
  }
};

/// to[x][i] = the numbers 2x and 2x + 1 of query i times its part of the scale, zeros up to whole
/// steps; (head_dim / 2, pitch). row(i): its numbers.
template <class Row>
FLASH_NOINLINE void pack_queries(int count, int head_dim, int64_t pitch, Real scale, Real* to,
                                 Row&& row) {
  const auto read = [&](int i, int x, int pairs, Int* line) {  // of zeros
    const int left = smaller(2 * pairs, head_dim - 2 * x);
    std::memcpy(line, row(i) + 2 * x, sizeof(BFloat16) * left);
  };
  const int rows = round_up(head_dim, kTileDepth) / 2;
  transpose_rows(count, rows, pitch, reinterpret_cast<Int*>(to), read);
  constexpr Bits kHigh = 0xffff0000;
  const Vector factor = splat(SplitScale::of(scale).of_queries);
  for (int64_t i = 0; i < rows * pitch; i += kLanes) {
    const BitVector pairs = bits_of(load(to + i));
    const BitVector low = bits_of(from_bits(pairs << 16) * factor);
    const BitVector high = bits_of(from_bits(pairs & kHigh) * factor);
    store(to + i, from_bits(low >> 16 | (high & kHigh)));
  }
}

/// Rows of K, padded to whole steps.
FLASH_NOINLINE void copy_keys(const BFloat16* k, int64_t stride, int count, int head_dim,
                              BFloat16* to) {
  const int width = round_up(head_dim, kTileDepth);
  for (int j = 0; j < count; ++j, to += width, k += stride) {
    std::memset(to + head_dim, 0, sizeof(BFloat16) * (width - head_dim));
    std::memcpy(to, k, sizeof(BFloat16) * head_dim);
  }
}

typedef uint16_t HalfVector __attribute__((vector_size(64)));
constexpr uint16_t kExponent = 0x7f80;  ///< of bf16: all of these bits are set in inf and NaN

/// 32 rows of 8 numbers become 8 rows of 32, kBlockKeys apart. Returns the largest exponents.
/// Rows i, i + 8, i + 16, i + 24 are the quarters of a vector; three rounds of interleaving in the
/// quarters transpose 8 x 8 numbers in each.
template <bool kLeavesOut>
FLASH_INLINE HalfVector transpose_8(const BFloat16* rows, int64_t stride, BFloat16* to) {
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
    std::memcpy(to + 2 * i * kBlockKeys, &low, sizeof low);
    std::memcpy(to + (2 * i + 1) * kBlockKeys, &high, sizeof high);
  }
  return largest_exponent;
}

/// V^T of a block; whether all values are finite. With kLeavesOut those that are not become 0.
template <bool kLeavesOut>
FLASH_NOINLINE bool transpose_values(const BFloat16* v, int64_t stride, int count, int head_dim_v,
                                     BFloat16* to) {
  HalfVector largest_exponent{};
  for (int first = 0; first < count; first += kTileDepth) {
    const int keys = smaller(kTileDepth, count - first);
    for (int c = 0; c < head_dim_v; c += 8) {
      const BFloat16* rows = v + first * stride + c;
      const int columns = smaller(8, head_dim_v - c);
      BFloat16 padded[kTileDepth][8];
      int64_t row_stride = stride;
      if (keys < kTileDepth || columns < 8) {
        std::memset(padded, 0, sizeof padded);
        for (int j = 0; j < keys; ++j)
          std::memcpy(padded[j], rows + j * stride, sizeof(BFloat16) * columns);
        rows = padded[0], row_stride = 8;
      }
      const HalfVector exponent =
          transpose_8<kLeavesOut>(rows, row_stride, to + c * kBlockKeys + first);
      largest_exponent = exponent > largest_exponent ? exponent : largest_exponent;
    }
  }
  const BitVector found = (BitVector)(largest_exponent == kExponent);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (found[lane]) return false;
  }
  return true;
}
/// V^T of a block, 0 where a value is not finite; whether all are.
FLASH_INLINE bool pack_values(const BFloat16* v, int64_t stride, int count, int head_dim_v,
                              BFloat16* to) {
  if (transpose_values<false>(v, stride, count, head_dim_v, to)) return true;
  return transpose_values<true>(v, stride, count, head_dim_v, to);
}

/// C of all strips of 16 rows of A.
template <int kVectors>
FLASH_INLINE void multiply_tiles(const BFloat16* a, int64_t a_stride, int rows, const void* b,
                                 int steps, float* out) {
  constexpr int kPitch = kVectors * kLanes;
  const auto* bytes = reinterpret_cast<const char*>(a);
  const auto* pairs = reinterpret_cast<const char*>(b);
  int r = 0;
  for (; r + 16 < rows; r += 32)
    multiply_strips<2, kVectors>(bytes + r * a_stride * 2, a_stride * 2, pairs, kPitch, steps,
                                 out + r * kPitch);
  if (r < rows)
    multiply_strips<1, kVectors>(bytes + r * a_stride * 2, a_stride * 2, pairs, kPitch, steps,
                                 out + r * kPitch);
}

/// S^T and the running maximum over its keys.
template <int kVectors>
FLASH_NOINLINE void score_in_tiles(const TileBlock& block, const Real* queries, Real* s,
                                   Real* row_max) {
  multiply_tiles<kVectors>(block.k, block.k_stride, block.count(), queries,
                           round_up(block.head_dim, kTileDepth) / kTileDepth, s);
  const Vector scale = splat(SplitScale::of(block.scale).of_scores);
  VectorGroup<kVectors> max = load_group<kVectors>(row_max);
  for (int j = 0; j < block.count(); ++j) {
    FLASH_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Real* score = s + (j * kVectors + v) * kLanes;
      const Vector scaled = load(score) * scale;
      store(score, scaled);
      max.x[v] = largest(scaled, max.x[v]);
    }
  }
  store_group(row_max, max);
}

/// The weights of two keys, rounded to nearest even, as pairs; the first in the low halves.
FLASH_INLINE IntVector weight_pairs(Vector first, Vector second) {
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

/// P in pairs of keys, zeros up to whole steps; (keys / 2, pitch).
template <int kVectors>
FLASH_NOINLINE void pack_weights(const Real* p, int count, Int* to) {
  constexpr int kPitch = kVectors * kLanes;
  int j = 0;
  for (; j + 1 < count; j += 2, to += kPitch) {
    FLASH_UNROLL
    for (int x = 0; x < kPitch; x += kLanes) {
      const IntVector pairs =
          weight_pairs(load(p + j * kPitch + x), load(p + (j + 1) * kPitch + x));
      std::memcpy(to + x, &pairs, sizeof pairs);
    }
  }
  if (j < count) {
    FLASH_UNROLL
    for (int x = 0; x < kPitch; x += kLanes) {
      const IntVector pairs = weight_pairs(load(p + j * kPitch + x), Vector{});
      std::memcpy(to + x, &pairs, sizeof pairs);
    }
    j += 2, to += kPitch;
  }
  for (; j < round_up(count, kTileDepth); j += 2, to += kPitch)
    std::memset(to, 0, sizeof(Int) * kPitch);
}

/// O^T = alpha O^T + V^T P^T; `sums` takes 32 columns of the product.
template <int kVectors>
FLASH_NOINLINE void output_in_tiles(const TileBlock& block, const Int* weights, Real* sums,
                                    Real* o_t, const Real* alpha) {
  constexpr int kColumns = 32;
  const VectorGroup<kVectors> factor = load_group<kVectors>(alpha);
  const int steps = round_up(block.count(), kTileDepth) / kTileDepth;
  for (int c = 0; c < block.v.width; c += kColumns) {
    const int columns = smaller(kColumns, block.v.width - c);
    multiply_tiles<kVectors>(block.v_t + c * kBlockKeys, kBlockKeys, columns, weights, steps, sums);
    for (int r = 0; r < columns; ++r) {
      FLASH_UNROLL
      for (int x = 0; x < kVectors; ++x) {
        Real* out = o_t + ((c + r) * kVectors + x) * kLanes;
        store(out, fma(load(out), factor.x[x], load(sums + (r * kVectors + x) * kLanes)));
      }
    }
  }
}

/// What V^T left out: values that are not finite, for the queries that keep their key. A weight
/// that is marked by -0 is of a pair that is dropped.
template <int kVectors>
FLASH_NOINLINE void add_infinite_values(const Rows& v, const Real* p, Real* o_t) {
  constexpr int kPitch = kVectors * kLanes;
  constexpr Bits kMark = Bits(1) << 31;
  for (int j = 0; j < v.count; ++j) {
    for (int c = 0; c < v.width; ++c) {
      const Real value = v.data[j * v.stride + c];
      if (value * 0 == 0) continue;
      FLASH_UNROLL
      for (int x = 0; x < kPitch; x += kLanes) {
        const Vector weight = load(p + j * kPitch + x), out = load(o_t + c * kPitch + x);
        const IntVector is_dropped = bits_of(weight) == kMark;
        store(o_t + c * kPitch + x, select(is_dropped, out, fma(weight, splat(value), out)));
      }
    }
  }
}

}  // namespace
}  // namespace flash::cpu

#endif
