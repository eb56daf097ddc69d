// SPDX-License-Identifier: BSD-3-Clause
//
// One block of keys for one group of queries: the body of the inner loop of FlashAttention-2,
// Algorithm 1, transposed (lanes = queries; tile.h):
//     S^T = K Q^T          (keys, group)
//     alpha = 2^(u (m_old - m_new))  P^T = 2^(u (S^T - m_new))  l = alpha l + sum_j P^T[j]
//     O^T = alpha O^T + V^T P^T      (head_dim_v, group)
// Row maxima, row sums and masks are vertical operations. Scores are in units of log2, u = 1: the
// scale times log2 e is folded into Q^T, so any scale works, even a negative one, and exp2's
// argument reduction is exact. Where terms are added to scores they stay natural, u = log2 e, and
// the maximum is subtracted first: a row of the lowest finite numbers is a row of equal scores.
#pragma once

#include "cpu/forward_few.h"
#include "cpu/forward_pairs.h"
#include "cpu/score.h"

namespace flash::cpu {
namespace {

/// A group of queries on its way through the keys; views into the workspace.
struct Group {
  GroupQueries queries;
  Range any_keys;  ///< keys that at least one row keeps
  Range all_keys;  ///< keys that every row keeps
  bool is_first;   ///< of its unit to touch a block of keys
  Real *q, *o;     ///< number d of lane i is at d * column_step + i * lane_step
  int64_t column_step, q_lane_step, o_lane_step;
  Real *row_max, *row_sum;
  Lanes lanes;
};
/// What the lanes of the two products are; kPairs: queries, by pairs of bf16.
enum class Orientation { kQueries, kHeadDim, kPairs };

/// What a worker needs for the block in hand. Row `x` of an array is a group wide.
struct BlockScratch {
  Real *s, *new_max, *alpha;
  PairBlock pairs;              ///< kGeneral
  Real* dropout = nullptr;      ///< kGeneral
  Int* weight_pairs = nullptr;  ///< kPairs: P in pairs of keys
  Real* sums = nullptr;         ///< kPairs: 32 rows of a product
};

/// S^T and the running maximum over its keys.
template <int kVectors>
FLASH_NOINLINE void score_block(const Rows& k, const Real* q_t, Real* s, Real* row_max) {
  VectorGroup<kVectors> max = load_group<kVectors>(row_max);
  score_tiles<kVectors>(k, q_t, [&](int j, const VectorGroup<kVectors>& scores) {
    store_group(s + j * kVectors * kLanes, scores);
    FLASH_UNROLL
    for (int v = 0; v < kVectors; ++v) max.x[v] = largest(scores.x[v], max.x[v]);
  });
  store_group(row_max, max);
}

/// S^T = -inf where the interval mask drops the pair; only blocks at its edges come here. The
/// maximum is taken from the masked scores, so that a NaN in a dropped key cannot reach it.
template <int kVectors>
FLASH_NOINLINE void mask_block(const Lanes& lanes, int k_begin, int num_keys, Real* s,
                               Real* row_max) {
  VectorGroup<kVectors> max = load_group<kVectors>(row_max);
  for (int j = 0; j < num_keys; ++j) {
    FLASH_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Real* score = s + (j * kVectors + v) * kLanes;
      const Vector masked = select(keeps(lanes, v, k_begin + j), load(score), splat(-kInfinity));
      store(score, masked);
      max.x[v] = largest(masked, max.x[v]);
    }
  }
  store_group(row_max, max);
}

/// Score modifications and both masks.
template <int kVectors>
FLASH_NOINLINE void modify_block(const ScoreMod& mod, const Lanes& lanes, const PairBlock& pairs,
                                 int k_begin, int num_keys, Real* s, Real* row_max) {
  VectorGroup<kVectors> max = load_group<kVectors>(row_max);
  for (int j = 0; j < num_keys; ++j) {
    FLASH_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Real* score = s + (j * kVectors + v) * kLanes;
      const Vector modified =
          modified_score<kVectors>(mod, lanes, pairs, k_begin, j, v, load(score)).score;
      store(score, modified);
      max.x[v] = largest(modified, max.x[v]);
    }
  }
  store_group(row_max, max);
}

/// P^T, l, alpha, m. The loop has time to fetch the rows of V that the output product reads next,
/// if nobody has yet. With kMarkDropped a dropped pair weighs -0 instead of 0.
template <int kVectors, Variant kVariant, bool kMarkDropped>
FLASH_NOINLINE void softmax_block(Real* s, Real unit, const Rows& v, bool fetch_v, Real* row_max,
                                  const Real* new_max, Real* row_sum, Real* alpha) {
  const auto weight = [unit](Vector t) {
    return exp2_bounded(kVariant == Variant::kPlain ? t : t * splat(unit));
  };
  VectorGroup<kVectors> base, sum = splat_group<kVectors>(0);
  FLASH_UNROLL
  for (int x = 0; x < kVectors; ++x) {
    const Vector old_max = load(row_max + x * kLanes);
    const Vector max = load(new_max + x * kLanes);
    // A row with no key yet has m = -inf: subtract 0 then, for -inf - -inf is NaN.
    base.x[x] = select(max == splat(-kInfinity), splat(0), max);
    const Vector factor = weight(old_max - base.x[x]);
    store(alpha + x * kLanes, factor);
    store(row_max + x * kLanes, max);
  }
  for (int j = 0; j < v.count; ++j) {
    if (fetch_v) prefetch(v.data + j * v.stride, v.width);
    FLASH_UNROLL
    for (int x = 0; x < kVectors; ++x) {
      Real* score = s + (j * kVectors + x) * kLanes;
      const Vector t = load(score);
      Vector p = weight(t - base.x[x]);
      sum.x[x] += p;
      if constexpr (kMarkDropped) p = select(t == splat(-kInfinity), splat(-Real(0)), p);
      store(score, p);
    }
  }
  FLASH_UNROLL
  for (int x = 0; x < kVectors; ++x) {
    Real* total = row_sum + x * kLanes;
    store(total, fma(load(total), load(alpha + x * kLanes), sum.x[x]));
  }
}

/// P^T *= 0 or 1. A mark of -0 survives.
FLASH_NOINLINE void drop_weights(const Real* factor, int count, Real* p) {
  for (int i = 0; i < count; i += kLanes) store(p + i, load(p + i) * load(factor + i));
}

template <int kVectors>
FLASH_NOINLINE void output_block(const Rows& v, const Real* p, Real* o_t, const Real* alpha) {
  output_tiles<kVectors>(v, p, o_t, load_group<kVectors>(alpha));
}

/// No NaN, no infinity. x * 0 is 0 for every finite x and NaN for the others.
FLASH_NOINLINE bool all_finite(const Rows& v) {
  Vector poison = splat(0);
  Real rest = 0;
  for (int j = 0; j < v.count; ++j) {
    const Real* row = v.data + j * v.stride;
    int c = 0;
    for (; c + kLanes <= v.width; c += kLanes) poison = fma(load(row + c), splat(0), poison);
    for (; c < v.width; ++c) rest += row[c] * 0;
  }
  return sum_of_lanes(poison) + rest == 0;
}
/// 0 * NaN is NaN: a weight of exactly 0 does not protect a query from a NaN or infinity in a value
/// that it does not attend. Where such a value is there, add pair by pair, passing the marked ones.
FLASH_NOINLINE void output_of_kept_pairs(const Group& group, int pitch, const Rows& v,
                                         const Real* p, const Real* alpha) {
  for (int i = 0; i < group.queries.count(); ++i) {
    for (int c = 0; c < v.width; ++c) {
      Vector acc = splat(0);
      for (int j = 0; j < v.count; ++j) {
        const Real weight = p[j * pitch + i];
        if (weight == 0 && __builtin_signbit(weight)) continue;
        acc = fma(splat(v.data[j * v.stride + c]), splat(weight), acc);
      }
      Real& out = group.o[c * group.column_step + i * group.o_lane_step];
      out = fma(splat(out), splat(alpha[i]), acc)[0];
    }
  }
}

/// The keys of a block, as a product takes them.
template <Orientation>
struct KeyOperands {
  Rows k, v;

  int count() const { return k.count; }
  bool has_finite_values() const { return all_finite(v); }
};
/// What a worker's thread needs while it makes products.
template <Orientation>
struct ThreadState {
  ThreadState() {}
};
#if defined(FLASH_CPU_BF16)
template <>
struct KeyOperands<Orientation::kPairs> : PairOperands {};
template <>
struct ThreadState<Orientation::kPairs> : PairScope {};
#endif

template <int kVectors>
FLASH_INLINE void score_product(const Group& group, const KeyOperands<Orientation::kQueries>& block,
                                Real* s, Real* row_max) {
  score_block<kVectors>(block.k, group.q, s, row_max);
}
template <int kVectors>
FLASH_INLINE void score_product(const Group& group, const KeyOperands<Orientation::kHeadDim>& block,
                                Real* s, Real* row_max) {
  score_few(block.k, group.q, group.q_lane_step, group.queries.count(), s, row_max);
}
template <int kVectors>
FLASH_INLINE void output_product(const Group& group,
                                 const KeyOperands<Orientation::kQueries>& block,
                                 const BlockScratch& scratch) {
  output_block<kVectors>(block.v, scratch.s, group.o, scratch.alpha);
}
template <int kVectors>
FLASH_INLINE void output_product(const Group& group,
                                 const KeyOperands<Orientation::kHeadDim>& block,
                                 const BlockScratch& scratch) {
  const int count = group.queries.count();
  const auto output = count == 1   ? output_few<1>
                      : count == 2 ? output_few<2>
                                   : output_few<kFewQueries>;
  output(block.v, scratch.s, group.o, group.o_lane_step, scratch.alpha);
}
#if defined(FLASH_CPU_BF16)
template <int kVectors>
FLASH_INLINE void score_product(const Group& group, const KeyOperands<Orientation::kPairs>& block,
                                Real* s, Real* row_max) {
  score_in_pairs<kVectors>(block, reinterpret_cast<const Int*>(group.q), s, row_max);
}
template <int kVectors>
FLASH_INLINE void output_product(const Group& group, const KeyOperands<Orientation::kPairs>& block,
                                 const BlockScratch& scratch) {
  pack_weights<kVectors>(scratch.s, block.count(), scratch.weight_pairs);
  output_in_pairs<kVectors>(block, scratch.weight_pairs, scratch.sums, group.o, scratch.alpha);
  if (!block.has_finite_values()) add_infinite_values<kVectors>(block.v, scratch.s, group.o);
}
#endif

/// `unit` is u; `block` are the keys that the group may keep, from key k_begin on.
template <int kVectors, Variant kVariant, class Element, Orientation kOrientation>
FLASH_INLINE void forward_block(const Group& group, const ForwardParams& p, Real unit, int k_begin,
                                const KeyOperands<kOrientation>& block,
                                const BlockScratch& scratch) {
  constexpr int kPitch = kVectors * kLanes;
  const ScoreMod& mod = p.features.score_mod;
  const int num_keys = block.count();
  bool may_drop = k_begin < group.all_keys.begin || k_begin + num_keys > group.all_keys.end;
  store_group(scratch.new_max, load_group<kVectors>(group.row_max));
  score_product<kVectors>(group, block, scratch.s, scratch.new_max);
  if (kVariant == Variant::kGeneral && mod.enabled()) {
    may_drop |= mod.mask.data || mod.bias.data;
    load_pairs<Element>(mod, group.queries, k_begin, num_keys, kPitch, scratch.pairs);
    store_group(scratch.new_max, load_group<kVectors>(group.row_max));
    modify_block<kVectors>(mod, group.lanes, scratch.pairs, k_begin, num_keys, scratch.s,
                           scratch.new_max);
  } else if (may_drop) {
    store_group(scratch.new_max, load_group<kVectors>(group.row_max));
    mask_block<kVectors>(group.lanes, k_begin, num_keys, scratch.s, scratch.new_max);
  }
  const bool marks = may_drop && !block.has_finite_values();
  const auto softmax =
      marks ? softmax_block<kVectors, kVariant, true> : softmax_block<kVectors, kVariant, false>;
  const bool fetch_v = group.is_first && kOrientation != Orientation::kPairs;
  softmax(scratch.s, unit, block.v, fetch_v, group.row_max, scratch.new_max, group.row_sum,
          scratch.alpha);
  if (kVariant == Variant::kGeneral && p.features.dropout.enabled()) {
    const GroupQueries& queries = group.queries;
    dropout_factors(
        DropoutStream::of(p.features.dropout, queries.batch, queries.head_begin, p.num_heads),
        queries, k_begin, num_keys, kPitch, scratch.dropout);
    drop_weights(scratch.dropout, num_keys * kPitch, scratch.s);
  }
  if (marks && kOrientation != Orientation::kPairs) {
    output_of_kept_pairs(group, kPitch, block.v, scratch.s, scratch.alpha);
  } else {
    output_product<kVectors>(group, block, scratch);
  }
}

}  // namespace
}  // namespace flash::cpu
