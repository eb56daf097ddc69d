// SPDX-License-Identifier: BSD-3-Clause
//
// FlashAttention-2 forward with lanes = queries.
//
//   group   up to kGroupQueries query rows of one head, or of several heads of one kv head where
//           they have few rows each (decode)
//   unit    up to kUnitGroups groups of one kv head, heads before rows, that share each block of
//           keys while it is in the caches: what a worker takes from the counter
//   block   kBlockKeys keys, read where they lie; of 16-bit tensors, widened once per unit
//
// Where a kv head has at most kFewQueries rows in all, the two products have lanes = head_dim
// (forward_few.h).
//
// Every row is computed by one worker, over the same blocks, whoever it is and whatever rows go
// with it: its bits depend on nothing else.
#pragma once

#include "cpu/forward_block.h"
#include "cpu/forward_units.h"
#include "cpu/kernels.h"

namespace flash::cpu {
namespace {

/// Q with `scale` (of kPairs a part of it) folded in, zeros where lanes stand for nothing; O, m and
/// l of rows that have seen no key.
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
  std::memset(group.o, 0, sizeof(Real) * kGroupQueries * whole_vectors(p.head_dim_v));
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

/// The rows [begin, end) of K or V of one head: in place, or widened into `wide`.
template <class Element>
FLASH_INLINE Rows block_rows(const TensorView& tensor, int64_t head_offset, Range keys, int width,
                             Real* wide, int wide_stride) {
  const Element* data =
      static_cast<const Element*>(tensor.data) + head_offset + keys.begin * tensor.row_stride;
  const int count = keys.end - keys.begin;
  if constexpr (sizeof(Element) == sizeof(Real)) {
    return {data, tensor.row_stride, count, width};
  } else {
    for (int j = 0; j < count; ++j) {
      widen_row(data + j * tensor.row_stride, width, wide + int64_t(j) * wide_stride);
    }
    return {wide, wide_stride, count, width};
  }
}
FLASH_INLINE Rows part(const Rows& rows, int first, int count) {
  return {rows.data ? rows.data + first * rows.stride : nullptr, rows.stride, count, rows.width};
}

/// A call, as every worker sees it.
struct ForwardCall {
  const ForwardParams& p;
  WorkspaceLayout layout;
  UnitGrid grid;
  ScoreUnit unit;
  Real scale;  ///< folded into Q^T
  char* workspace;
  int64_t next_unit;  ///< shared by the workers, atomic
};

/// A unit in hand.
struct Unit {
  Sequence qs, ks;
  int head_k, num_groups;
  Range keys;  ///< that at least one of its rows keeps
  Group groups[kUnitGroups];
};

template <Orientation kOrientation, class Element>
FLASH_INLINE void begin_unit(const ForwardCall& call, int64_t index, Real* scratch, Unit& unit) {
  const ForwardParams& p = call.p;
  const WorkspaceLayout& w = call.layout;
  const int64_t heads = int64_t(p.batch) * p.num_heads_k;
  const int batch = int(index % heads / p.num_heads_k);
  const int first_group =
      int(call.grid.units_per_head - 1 - index / heads) * call.grid.groups_per_unit;
  unit.head_k = int(index % p.num_heads_k);
  unit.qs = Sequence::of(p.q_layout, batch);
  unit.ks = Sequence::of(p.k_layout, batch);
  const GroupCut cut = GroupCut::of(p, unit.qs.length);
  unit.num_groups = smaller(call.grid.groups_per_unit, cut.groups() - first_group);
  unit.keys = {unit.ks.length, 0};
  const IntervalMask mask = p.mask_of(unit.qs, unit.ks);
  constexpr bool few = kOrientation == Orientation::kHeadDim;
  for (int g = 0; g < unit.num_groups; ++g) {
    Group& group = unit.groups[g];
    Real* at = scratch + w.groups + g * w.group_size;
    group.queries = cut.group(p, batch, unit.head_k, unit.qs.length, first_group + g);
    group.any_keys = mask.any_keys(group.queries.q_begin, group.queries.q_end);
    group.all_keys = mask.all_keys(group.queries.q_begin, group.queries.q_end);
    group.is_first = g == 0;
    group.q = at + w.q;
    group.o = at + w.o;
    group.column_step = few ? 1 : group.queries.vectors() * kLanes;
    group.q_lane_step = few ? whole_vectors(p.head_dim) : 1;
    group.o_lane_step = few ? whole_vectors(p.head_dim_v) : 1;
    group.row_max = at + w.row_max;
    group.row_sum = at + w.row_sum;
    fill_lanes(p, mask, group.queries, group.lanes);
    load_queries<kOrientation, Element>(p, unit.qs, call.scale, group);
    if (group.any_keys.begin < group.any_keys.end) {
      unit.keys = {smaller(unit.keys.begin, group.any_keys.begin),
                   larger(unit.keys.end, group.any_keys.end)};
    }
  }
}

/// The block of keys of a unit, widened or packed where need be.
template <Orientation kOrientation, class Element>
FLASH_INLINE KeyOperands<kOrientation> load_block(const ForwardCall& call, const Unit& unit,
                                                  Range keys, Real* scratch) {
  const ForwardParams& p = call.p;
  const WorkspaceLayout& w = call.layout;
  const int64_t k_head = p.k.offset(unit.ks, unit.head_k),
                v_head = p.v.offset(unit.ks, unit.head_k);
  const auto values = [&] {
    return block_rows<Element>(p.v, v_head, keys, p.head_dim_v, scratch + w.wide_v, w.v_stride);
  };
  if constexpr (kOrientation == Orientation::kPairs) {
    const int count = keys.end - keys.begin;
    const auto* k = static_cast<const Element*>(p.k.data) + k_head + keys.begin * p.k.row_stride;
    const auto* v = static_cast<const Element*>(p.v.data) + v_head + keys.begin * p.v.row_stride;
    KeyOperands<kOrientation> block{
        k, p.k.row_stride, nullptr, {nullptr, 0, count, p.head_dim_v}, p.head_dim, call.scale};
    if (count < kBlockKeys || p.head_dim % kPairDepth != 0) {
      auto* copy = reinterpret_cast<Element*>(scratch + w.copied_k);
      copy_rows(k, p.k.row_stride, count, p.head_dim, copy);
      block.k = copy, block.k_stride = round_up(p.head_dim, kPairDepth);
    }
    auto* v_t = reinterpret_cast<Element*>(scratch + w.v_t);
    if (!pack_values(v, p.v.row_stride, count, p.head_dim_v, v_t)) block.v = values();
    block.v_t = v_t;
    return block;
  } else {
    return {block_rows<Element>(p.k, k_head, keys, p.head_dim, scratch + w.wide_k, w.k_stride),
            values()};
  }
}
/// The keys from `first` on.
template <Orientation kOrientation>
FLASH_INLINE KeyOperands<kOrientation> part(const KeyOperands<kOrientation>& block, int first,
                                            int count) {
  if constexpr (kOrientation == Orientation::kPairs) {
    KeyOperands<kOrientation> some = block;
    some.k += first * block.k_stride;
    some.v_t += first;
    some.v = part(block.v, first, count);
    return some;
  } else {
    return {part(block.k, first, count), part(block.v, first, count)};
  }
}

template <Orientation kOrientation, Variant kVariant, class Element>
FLASH_NOINLINE void run_unit(const ForwardCall& call, int64_t index, Real* scratch) {
  const ForwardParams& p = call.p;
  const WorkspaceLayout& w = call.layout;
  Unit unit;
  begin_unit<kOrientation, Element>(call, index, scratch, unit);
  const BlockScratch block_scratch{
      scratch + w.s,       scratch + w.new_max,
      scratch + w.alpha,   {scratch + w.bias, reinterpret_cast<Int*>(scratch + w.kept)},
      scratch + w.dropout, reinterpret_cast<Int*>(scratch + w.weight_pairs),
      scratch + w.sums};
  // Products in pairs begin at whole steps: keys before that no row keeps are masked like others.
  constexpr int kStep = kOrientation == Orientation::kPairs ? kPairDepth : 1;
  const Range keys = unit.keys;
  for (int begin = keys.begin / kBlockKeys * kBlockKeys; begin < keys.end; begin += kBlockKeys) {
    const Range range{kStep == 1 ? larger(begin, keys.begin) : begin,
                      smaller(begin + kBlockKeys, kStep == 1 ? keys.end : unit.ks.length)};
    const auto block = load_block<kOrientation, Element>(call, unit, range, scratch);
    for (int g = 0; g < unit.num_groups; ++g) {
      const Group& group = unit.groups[g];
      const int k_begin = larger(range.begin, group.any_keys.begin / kStep * kStep);
      const int count = smaller(range.end, group.any_keys.end) - k_begin;
      if (count <= 0) continue;
      auto step = [&]<int kVectors> {
        forward_block<kVectors, kVariant, Element>(group, p, call.unit.to_log2, k_begin,
                                                   part(block, k_begin - range.begin, count),
                                                   block_scratch);
      };
      const int vectors = group.queries.vectors();
      if (kOrientation == Orientation::kHeadDim || vectors == 1) {
        step.template operator()<1>();
      } else if constexpr (kOrientation != Orientation::kHeadDim) {
        vectors == 2 ? step.template operator()<2>() : step.template operator()<kQueryVectors>();
      }
    }
  }
  for (int g = 0; g < unit.num_groups; ++g)
    store_output<Element>(p, unit.qs, call.unit, unit.groups[g]);
}

template <Orientation kOrientation, Variant kVariant, class Element>
void work(void* context, int worker) {
  ForwardCall& call = *static_cast<ForwardCall*>(context);
  Real* scratch = reinterpret_cast<Real*>(call.workspace + worker * call.layout.bytes());
  const ThreadState<kOrientation> state;
  for (;;) {
    const int64_t unit = __atomic_fetch_add(&call.next_unit, 1, __ATOMIC_RELAXED);
    if (unit >= call.grid.units) return;
    run_unit<kOrientation, kVariant, Element>(call, unit, scratch);
  }
}

int64_t forward_workspace_bytes(const ForwardParams& p, int num_workers) {
  return num_workers * WorkspaceLayout::of(p).bytes();
}

void forward(const ForwardParams& p, const Launch& launch) {
  if (p.batch == 0 || p.num_heads == 0 || p.q_layout.max == 0) return;
  const bool few = has_few_queries(p);
  const double rows = few ? double(p.batch) * p.num_heads_k * kFewQueries
                          : double(p.batch) * p.num_heads * p.q_layout.max;
  const double products = rows * p.k_layout.max * (p.head_dim + p.head_dim_v);
  const bool shared = launch.workers->count() > 1 && products >= kWorthSharing;
  const ScoreUnit unit = ScoreUnit::of(p.features.score_mod);
  ForwardCall call{p,
                   WorkspaceLayout::of(p),
                   UnitGrid::of(p, shared ? launch.workers->count() : 1),
                   unit,
                   Real(p.softmax_scale * (unit.to_log2 == 1 ? M_LOG2E : 1.0)),
                   static_cast<char*>(launch.workspace),
                   0};
  const auto with = [&]<class Element> {
    using enum Orientation;
    constexpr Orientation kMany = kHasPairs ? kPairs : kQueries;
    void (*run)(void*, int);
    if (p.features.enabled()) {
      run = few ? work<kHeadDim, Variant::kGeneral, Element>
                : work<kMany, Variant::kGeneral, Element>;
    } else {
      run = few ? work<kHeadDim, Variant::kPlain, Element> : work<kMany, Variant::kPlain, Element>;
    }
    shared ? launch.workers->run(run, &call) : run(&call, 0);
  };
#if defined(FLASH_CPU_BF16)
  with.template operator()<BFloat16>();
#else
  with_element(p.dtype, with);
#endif
}

}  // namespace
}  // namespace flash::cpu
