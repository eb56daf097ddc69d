// SPDX-License-Identifier: BSD-3-Clause
// The rows of a group: Q into its operand, O and lse out of the running sums.
#pragma once

#include "cpu/forward_block.h"
#include "cpu/forward_units.h"

namespace flash::cpu {
namespace {

/// Q with `scale` (of kPairs a part of it) folded in, zeros where lanes stand for nothing.
template <Orientation kOrientation, class Element>
FLASH_NOINLINE void load_queries(const ForwardParams& p, const Sequence& sequence, Real scale,
                                 const Group& group) {
  const GroupQueries& queries = group.queries;
  const auto row = [&](int i) {
    const int head = queries.head_begin + i / queries.rows();
    const int64_t q = queries.q_begin + i % queries.rows();
    return static_cast<const Element*>(p.q.data) + p.q.offset(sequence, head) + q * p.q.row_stride;
  };
  const auto read = [&](int i, int d, int count, Real* to) {
    const Element* from = row(i);
    for (int x = 0; x < count; ++x) to[x] = widen(from[d + x]) * scale;
  };
  if constexpr (kOrientation == Orientation::kPairs) {
    pack_scaled_columns(queries.count(), p.head_dim, group.column_step, scale,
                        reinterpret_cast<Int*>(group.q), row);
  } else if constexpr (kOrientation == Orientation::kQueries) {
    transpose_rows(queries.count(), p.head_dim, group.column_step, group.q, read);
  } else {
    std::memset(group.q, 0, sizeof(Real) * kFewQueries * group.q_lane_step);
    for (int i = 0; i < queries.count(); ++i) {
      read(i, 0, p.head_dim, group.q + i * group.q_lane_step);
    }
  }
}
/// O, m and l of rows that have seen no key.
template <Orientation kOrientation>
FLASH_INLINE void clear_sums(const ForwardParams& p, const Group& group) {
  constexpr int kRows = kOrientation == Orientation::kHeadDim ? kFewQueries : kGroupQueries;
  std::memset(group.o, 0, sizeof(Real) * kRows * whole_vectors(p.head_dim_v));
  for (int i = 0; i < kGroupQueries; ++i) {
    group.row_max[i] = -kInfinity;
    group.row_sum[i] = 0;
  }
}

FLASH_INLINE Real log2_of(Real x) { return sizeof(Real) == 4 ? Real(log2f(x)) : Real(log2(x)); }
FLASH_INLINE Real exp2_of(Real x) { return exp2_of(splat(x))[0]; }

/// What scores are counted in: exp(score) = 2^(to_log2 score), natural logarithm = to_natural
/// score.
struct ScoreUnit {
  Real to_log2, to_natural, from_natural;

  /// Where terms are added to scores. A bool mask alone is none, so that one that keeps everything
  /// changes no bit.
  static ScoreUnit of(const ScoreMod& mod) {
    const bool natural = mod.has_softcap() || mod.bias.data || mod.alibi_slopes;
    return natural ? ScoreUnit{kLog2E, 1, 1} : ScoreUnit{1, kLn2, kLog2E};
  }
};

/// O = O^T / l and lse = ln(l e^m); of an empty row, 0 and -inf. A sink is one more key with a
/// logit and no value: l e^m becomes l e^m + e^sink.
struct RowResult {
  Real factor, lse;

  static FLASH_HOST_DEVICE RowResult of(Real max, Real sum, const ScoreUnit& unit) {
    if (sum == 0) return {0, -kInfinity};
    return {1 / sum, max * unit.to_natural + log2_of(sum) * kLn2};
  }
  static FLASH_HOST_DEVICE RowResult with_sink(Real max, Real sum, Real sink,
                                               const ScoreUnit& unit) {
    if (sum == 0) return {0, sink};
    const Real logit = sink * unit.from_natural, new_max = logit > max ? logit : max;
    const Real base = new_max == -kInfinity ? 0 : new_max;
    const Real shrink = exp2_of((max - base) * unit.to_log2);
    const Real total = sum * shrink + exp2_of((logit - base) * unit.to_log2);
    return {shrink / total, base * unit.to_natural + log2_of(total) * kLn2};
  }
};
template <class Element>
FLASH_NOINLINE void store_output(const ForwardParams& p, const Sequence& sequence,
                                 const ScoreUnit& unit, const Group& group) {
  const Features& features = p.features;
  for_each_query(group.queries, [&](int i, int head, int64_t q) {
    const Real max = group.row_max[i], sum = group.row_sum[i];
    RowResult row = features.sink.enabled()
                        ? RowResult::with_sink(max, sum, features.sink.of<Real>(head), unit)
                        : RowResult::of(max, sum, unit);
    static_cast<Real*>(p.lse.data)[p.lse.offset(sequence, head) + q] = row.lse;
    if (features.dropout.enabled()) row.factor *= Real(features.dropout.scale);
    Element* out =
        static_cast<Element*>(p.out.data) + p.out.offset(sequence, head) + q * p.out.row_stride;
    const Real* from = group.o + i * group.o_lane_step;
    for (int c = 0; c < p.head_dim_v; ++c) {
      out[c] = narrow<Element>(from[c * group.column_step] * row.factor);
    }
  });
}

}  // namespace
}  // namespace flash::cpu
