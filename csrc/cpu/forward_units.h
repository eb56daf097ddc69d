// SPDX-License-Identifier: BSD-3-Clause
//
// How the rows of a call are cut into groups and units (forward.h), and where a worker's scratch
// lies.
#pragma once

#include "cpu/forward_few.h"
#include "cpu/score.h"

namespace flash::cpu {
namespace {

constexpr int kUnitGroups = 4;
/// Multiply-adds below which waking other threads costs more than it gains: about 20 us of work.
constexpr double kWorthSharing = 1e6;

/// The rows of a call that share a pass over the keys are few: lanes = head_dim. Known from the
/// longest sequence and the ratio of heads alone, so that no row's bits depend on the batch.
FLASH_INLINE bool has_few_queries(const ForwardParams& p) {
  return int64_t(p.gqa_ratio()) * p.q_layout.max <= kFewQueries;
}
FLASH_INLINE int whole_vectors(int width) { return round_up(width, kLanes); }

/// How the rows of one kv head's query heads are cut into groups, for queries of one length.
struct GroupCut {
  int rows_per_group, heads_per_group, row_cuts, head_cuts;

  static GroupCut of(const ForwardParams& p, int seqlen_q) {
    const int ratio = p.gqa_ratio();
    if (seqlen_q <= 0) return {1, 1, 0, 0};
    int heads = smaller(larger(kGroupQueries / seqlen_q, 1), ratio);
    if (p.features.dropout.enabled()) heads = 1;  // one stream per group
    return {kGroupQueries, heads, (seqlen_q + kGroupQueries - 1) / kGroupQueries,
            (ratio + heads - 1) / heads};
  }
  int groups() const { return row_cuts * head_cuts; }
  /// Heads before rows: group g of a sequence and kv head.
  GroupQueries group(const ForwardParams& p, int batch, int head_k, int seqlen_q, int g) const {
    const int ratio = p.gqa_ratio(), head = g % head_cuts * heads_per_group;
    const int row = g / head_cuts * rows_per_group;
    return {batch, head_k * ratio + head, smaller(heads_per_group, ratio - head), row,
            smaller(row + rows_per_group, seqlen_q)};
  }
};

/// Few queries meet their keys in spans that are added up, so that a long cache of few heads can
/// keep every worker busy. A multiple of kBlockKeys.
constexpr int kSpanKeys = 512;
FLASH_INLINE int span_count(const ForwardParams& p) {
  return has_few_queries(p) ? larger((p.k_layout.max + kSpanKeys - 1) / kSpanKeys, 1) : 1;
}

/// The units of a call: some groups of rows and some spans of their keys. `unit` counts heads and
/// sequences fastest, then rows from the last to the first, then spans: under a causal mask that is
/// the longest first.
struct UnitGrid {
  int groups_per_unit, units_per_head;  ///< for the longest sequence
  int spans, spans_per_unit;
  int64_t row_units, units;  ///< without and with spans

  static UnitGrid of(const ForwardParams& p, int num_workers) {
    const int groups = GroupCut::of(p, p.q_layout.max).groups();
    const int64_t heads = int64_t(p.batch) * p.num_heads_k;
    constexpr int kUnits = kHasPairs ? 2 : 4;  // of a worker; each packs V for itself
    UnitGrid grid{};
    grid.groups_per_unit = kUnitGroups;
    grid.spans = grid.spans_per_unit = span_count(p);
    for (;;) {
      grid.units_per_head = (groups + grid.groups_per_unit - 1) / grid.groups_per_unit;
      grid.row_units = heads * grid.units_per_head;
      grid.units = grid.row_units * ((grid.spans + grid.spans_per_unit - 1) / grid.spans_per_unit);
      if (num_workers == 1 || grid.units >= kUnits * num_workers) break;
      if (grid.groups_per_unit > 1) {
        grid.groups_per_unit /= 2;
      } else if (grid.spans_per_unit > 1) {
        grid.spans_per_unit = (grid.spans_per_unit + 1) / 2;
      } else {
        break;
      }
    }
    return grid;
  }
};

/// What the units of a call share where keys are in spans: O, m and l of every group and span, and
/// how many spans of a unit are done.
struct SpanLayout {
  int spans, groups_per_head;
  int64_t heads, o_size;

  static SpanLayout of(const ForwardParams& p) {
    return {span_count(p), GroupCut::of(p, p.q_layout.max).groups(),
            int64_t(p.batch) * p.num_heads_k, int64_t(kFewQueries) * whole_vectors(p.head_dim_v)};
  }
  int64_t group_size() const { return o_size + 2 * kGroupQueries; }
  int64_t counters() const { return spans > 1 ? heads * groups_per_head : 0; }
  /// In Reals, behind the counters.
  int64_t group(int64_t head, int index, int span) const {
    return round_up_line(counters()) +
           ((head * groups_per_head + index) * spans + span) * group_size();
  }
  int64_t bytes() const { return spans > 1 ? group(heads, 0, 0) * int64_t(sizeof(Real)) : 0; }

 private:
  static int64_t round_up_line(int64_t reals) { return (reals + 63) / 64 * 64; }
};

constexpr int kColumnsAtOnce = 32;  ///< of O, in a product in pairs

/// Where a worker's scratch lies, in Reals from its beginning.
struct WorkspaceLayout {
  int64_t next = 0;
  int64_t s, new_max, alpha, bias = 0, kept = 0, dropout = 0, wide_k = 0, wide_v = 0;
  int64_t copied_k = 0, v_t = 0, weight_pairs = 0, sums = 0;  ///< kPairs
  int64_t groups, q, o, row_max, row_sum, group_size;  ///< those of a group from its beginning
  int k_stride = 0, v_stride = 0;                      ///< of widened rows

  int64_t take(int64_t reals) {
    constexpr int64_t kLine = 64 / sizeof(Real);
    const int64_t taken = next;
    next += (reals + kLine - 1) / kLine * kLine;
    return taken;
  }
  static WorkspaceLayout of(const ForwardParams& p) {
    WorkspaceLayout w;
    const ScoreMod& mod = p.features.score_mod;
    constexpr int64_t kPairs = int64_t(kBlockKeys) * kGroupQueries;
    w.s = w.take(kPairs);
    w.new_max = w.take(kGroupQueries);
    w.alpha = w.take(kGroupQueries);
    if (mod.bias.data) w.bias = w.take(kPairs);
    if (mod.mask.data) w.kept = w.take(kPairs);
    if (p.features.dropout.enabled()) w.dropout = w.take(kPairs);
    const bool in_pairs = kHasPairs && !has_few_queries(p);
    if (element_bytes(p.dtype) < int(sizeof(Real))) {
      w.k_stride = widened_stride(p.head_dim);
      w.v_stride = widened_stride(p.head_dim_v);
      if (!in_pairs) w.wide_k = w.take(int64_t(kBlockKeys) * w.k_stride);
      w.wide_v = w.take(int64_t(kBlockKeys) * w.v_stride);
    }
    if (in_pairs) {
      w.copied_k = w.take(int64_t(kBlockKeys) * round_up(p.head_dim, kPairDepth) / 2);
      w.v_t = w.take(int64_t(kBlockKeys) * round_up(p.head_dim_v, kColumnsAtOnce) / 2);
      w.weight_pairs = w.take(kPairs / 2);
      w.sums = w.take(kColumnsAtOnce * kGroupQueries);
    }
    w.groups = w.next;
    w.q = w.take(int64_t(whole_vectors(p.head_dim)) * kGroupQueries) - w.groups;
    w.o = w.take(int64_t(whole_vectors(p.head_dim_v)) * kGroupQueries) - w.groups;
    w.row_max = w.take(kGroupQueries) - w.groups;
    w.row_sum = w.take(kGroupQueries) - w.groups;
    w.group_size = w.next - w.groups;
    w.next = w.groups + kUnitGroups * w.group_size;
    return w;
  }
  int64_t bytes() const { return next * int64_t(sizeof(Real)); }

 private:
  /// An odd number of cache lines: the rows of a block start in different sets of the L1 cache.
  static int widened_stride(int width) {
    constexpr int kLine = 64 / sizeof(Real);
    return (round_up(width, kLine) / kLine | 1) * kLine;
  }
};

}  // namespace
}  // namespace flash::cpu
