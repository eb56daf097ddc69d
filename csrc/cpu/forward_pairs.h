// SPDX-License-Identifier: BSD-3-Clause
//
// The two products of a block for bf16, in pairs (pair_product.h); lanes are queries, as in tile.h:
//     S^T = scale K Q^T       A = K where it lies         B = Q in pairs of columns
//     O^T = alpha O^T + V^T P^T       A = V^T, packed once a block    B = P in pairs of keys
// Weights are rounded to bf16 for the product; row sums add them as they are. Only for objects that
// define FLASH_CPU_BF16, with AVX-512.
#pragma once

#if defined(FLASH_CPU_BF16)

#include "cpu/forward_units.h"
#include "cpu/pair_pack.h"

namespace flash::cpu {
namespace {

/// A block of K and V of one head, as the products take it.
struct PairOperands {
  const BFloat16* k;    ///< (whole strips of keys, whole steps of head_dim)
  int64_t k_stride;     ///< of a row
  const BFloat16* v_t;  ///< (whole strips of head_dim_v, kBlockKeys): 0 behind the last key
  Rows v;               ///< widened where a value is not finite, else only its count and width
  int head_dim;
  Real scale;

  int count() const { return v.count; }
  bool has_finite_values() const { return !v.data; }
};

/// V^T of a block, 0 where a value is not finite; whether all are.
FLASH_INLINE bool pack_values(const BFloat16* v, int64_t stride, int count, int head_dim_v,
                              BFloat16* to) {
  if (transpose_numbers<false>(v, stride, count, head_dim_v, to, kBlockKeys)) return true;
  return transpose_numbers<true>(v, stride, count, head_dim_v, to, kBlockKeys);
}

/// S^T and the running maximum over its keys.
template <int kVectors>
FLASH_NOINLINE void score_in_pairs(const PairOperands& block, const Int* queries, Real* s,
                                   Real* row_max) {
  constexpr int kPitch = kVectors * kLanes;
  multiply_pairs<kVectors>(block.k, block.k_stride, block.count(), queries, kPitch,
                           round_up(block.head_dim, kPairDepth) / kPairDepth, s, kPitch);
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

/// P in pairs of keys, zeros up to whole steps; (keys / 2, pitch).
template <int kVectors>
FLASH_NOINLINE void pack_weights(const Real* p, int count, Int* to) {
  constexpr int kPitch = kVectors * kLanes;
  int j = 0;
  for (; j + 1 < count; j += 2, to += kPitch) {
    FLASH_UNROLL
    for (int x = 0; x < kPitch; x += kLanes) {
      const IntVector pairs =
          rounded_pairs(load(p + j * kPitch + x), load(p + (j + 1) * kPitch + x));
      std::memcpy(to + x, &pairs, sizeof pairs);
    }
  }
  if (j < count) {
    FLASH_UNROLL
    for (int x = 0; x < kPitch; x += kLanes) {
      const IntVector pairs = rounded_pairs(load(p + j * kPitch + x), Vector{});
      std::memcpy(to + x, &pairs, sizeof pairs);
    }
    j += 2, to += kPitch;
  }
  for (; j < round_up(count, kPairDepth); j += 2, to += kPitch)
    std::memset(to, 0, sizeof(Int) * kPitch);
}

/// O^T = alpha O^T + V^T P^T; `sums` takes 32 columns of the product.
template <int kVectors>
FLASH_NOINLINE void output_in_pairs(const PairOperands& block, const Int* weights, Real* sums,
                                    Real* o_t, const Real* alpha) {
  constexpr int kPitch = kVectors * kLanes;
  const VectorGroup<kVectors> factor = load_group<kVectors>(alpha);
  const int steps = round_up(block.count(), kPairDepth) / kPairDepth;
  for (int c = 0; c < block.v.width; c += kColumnsAtOnce) {
    const int columns = smaller(kColumnsAtOnce, block.v.width - c);
    multiply_pairs<kVectors>(block.v_t + c * kBlockKeys, kBlockKeys, columns, weights, kPitch,
                             steps, sums, kPitch);
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
