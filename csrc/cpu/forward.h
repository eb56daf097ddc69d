// SPDX-License-Identifier: BSD-3-Clause
//
// FlashAttention-2 forward with lanes = queries.
//
//   group   up to kGroupQueries query rows of one head, or of several heads of one kv head where
//           they have few rows each (decode)
//   unit    up to kUnitGroups groups of one kv head, heads before rows, that share each block of
//           keys while it is in the caches: what a worker takes from the counter
//   block   kBlockKeys keys, read where they lie; of 16-bit tensors, widened or packed once per
//   unit
//
// Where a kv head has at most kFewQueries rows in all, the two products have lanes = head_dim
// (forward_few.h), and a unit is a span of kSpanKeys keys. Whoever does the last span of a head
// adds them up, in their order:
//   m = max_s m_s,   l = sum_s 2^(u (m_s - m)) l_s,   O = sum_s 2^(u (m_s - m)) O_s
//
// Every row is computed over the same blocks and spans, whoever does it and whatever rows go with
// it: its bits depend on nothing else.
#pragma once

#include "cpu/forward_rows.h"
#include "cpu/forward_units.h"
#include "cpu/kernels.h"

namespace flash::cpu {
namespace {

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
  SpanLayout spans;
  UnitGrid grid;
  ScoreUnit unit;
  Real scale;  ///< folded into Q^T
  char* workspace;
  int64_t next_unit;  ///< shared by the workers, atomic

  /// What the workers share comes first, then what each has.
  Real* shared() const { return reinterpret_cast<Real*>(workspace); }
  int32_t* spans_done() const { return reinterpret_cast<int32_t*>(workspace); }
  Real* scratch(int worker) const {
    return reinterpret_cast<Real*>(workspace + spans.bytes() + worker * layout.bytes());
  }
};

/// A unit in hand.
struct Unit {
  Sequence qs, ks;
  int head_k, first_group, num_groups;
  int64_t head, rows_index;  ///< of all kv heads; of all units' rows
  Range keys;                ///< that at least one of its rows keeps
  Group groups[kUnitGroups];
};

/// O, m and l of a group: those of one span.
FLASH_INLINE void point_to_span(const ForwardCall& call, const Unit& unit, int g, int span,
                                Group& group) {
  group.o = call.shared() + call.spans.group(unit.head, unit.first_group + g, span);
  group.row_max = group.o + call.spans.o_size;
  group.row_sum = group.row_max + kGroupQueries;
}
/// After the last span of a unit's rows: O, m and l of all the spans. False for the others.
FLASH_NOINLINE bool add_spans(const ForwardCall& call, Real* scratch, Unit& unit) {
  const int num_spans = call.grid.spans;
  int32_t* done = call.spans_done() + unit.rows_index;
  if (__atomic_add_fetch(done, 1, __ATOMIC_ACQ_REL) < num_spans) return false;
  for (int g = 0; g < unit.num_groups; ++g) {
    Group& group = unit.groups[g];
    Real* at = scratch + call.layout.groups + g * call.layout.group_size;
    Group sum = group, part = group;
    sum.o = at + call.layout.o;
    sum.row_max = at + call.layout.row_max;
    sum.row_sum = at + call.layout.row_sum;
    for (int i = 0; i < group.queries.count(); ++i) {
      Real* o = sum.o + i * sum.o_lane_step;
      Real max = -kInfinity, total = 0;
      for (int span = 0; span < num_spans; ++span) {
        point_to_span(call, unit, g, span, part);
        if (part.row_max[i] > max) max = part.row_max[i];
      }
      for (int c = 0; c < sum.o_lane_step; c += kLanes) store(o + c, splat(0));
      for (int span = 0; span < num_spans; ++span) {
        point_to_span(call, unit, g, span, part);
        const Real base = max == -kInfinity ? 0 : max;
        const Vector factor = exp2_of(splat((part.row_max[i] - base) * call.unit.to_log2));
        total += factor[0] * part.row_sum[i];
        for (int c = 0; c < sum.o_lane_step; c += kLanes)
          store(o + c, fma(factor, load(part.o + i * part.o_lane_step + c), load(o + c)));
      }
      sum.row_max[i] = max, sum.row_sum[i] = total;
    }
    group = sum;
  }
  return true;
}

template <Orientation kOrientation, class Element>
FLASH_INLINE void begin_unit(const ForwardCall& call, int64_t rows_index, Real* scratch,
                             Unit& unit) {
  const ForwardParams& p = call.p;
  const WorkspaceLayout& w = call.layout;
  const int64_t heads = int64_t(p.batch) * p.num_heads_k;
  unit.rows_index = rows_index;
  unit.head = unit.rows_index % heads;
  const int batch = int(unit.head / p.num_heads_k);
  unit.first_group =
      int(call.grid.units_per_head - 1 - unit.rows_index / heads) * call.grid.groups_per_unit;
  unit.head_k = int(unit.head % p.num_heads_k);
  unit.qs = Sequence::of(p.q_layout, batch);
  unit.ks = Sequence::of(p.k_layout, batch);
  const GroupCut cut = GroupCut::of(p, unit.qs.length);
  unit.num_groups = smaller(call.grid.groups_per_unit, cut.groups() - unit.first_group);
  unit.keys = {unit.ks.length, 0};
  const IntervalMask mask = p.mask_of(unit.qs, unit.ks);
  constexpr bool few = kOrientation == Orientation::kHeadDim;
  for (int g = 0; g < unit.num_groups; ++g) {
    Group& group = unit.groups[g];
    Real* at = scratch + w.groups + g * w.group_size;
    group.queries = cut.group(p, batch, unit.head_k, unit.qs.length, unit.first_group + g);
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

/// The rows of a unit against `keys`.
template <Orientation kOrientation, Variant kVariant, class Element>
FLASH_NOINLINE void run_blocks(const ForwardCall& call, const Unit& unit, Range keys,
                               Real* scratch) {
  const ForwardParams& p = call.p;
  const WorkspaceLayout& w = call.layout;
  const BlockScratch block_scratch{
      scratch + w.s,       scratch + w.new_max,
      scratch + w.alpha,   {scratch + w.bias, reinterpret_cast<Int*>(scratch + w.kept)},
      scratch + w.dropout, reinterpret_cast<Int*>(scratch + w.weight_pairs),
      scratch + w.sums};
  // Products in pairs begin at whole steps: keys before that no row keeps are masked like others.
  constexpr int kStep = kOrientation == Orientation::kPairs ? kPairDepth : 1;
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
}

template <Orientation kOrientation, Variant kVariant, class Element>
FLASH_NOINLINE void run_unit(const ForwardCall& call, int64_t index, Real* scratch) {
  const UnitGrid& grid = call.grid;
  const bool in_spans = grid.spans > 1;
  Unit unit;
  begin_unit<kOrientation, Element>(call, index % grid.row_units, scratch, unit);
  const int first = int(index / grid.row_units) * grid.spans_per_unit;
  for (int span = first; span < smaller(first + grid.spans_per_unit, grid.spans); ++span) {
    Range keys = unit.keys;
    if (in_spans) {
      keys = {larger(keys.begin, span * kSpanKeys), smaller(keys.end, (span + 1) * kSpanKeys)};
    }
    for (int g = 0; g < unit.num_groups; ++g) {
      if (in_spans) point_to_span(call, unit, g, span, unit.groups[g]);
      clear_sums<kOrientation>(call.p, unit.groups[g]);
    }
    run_blocks<kOrientation, kVariant, Element>(call, unit, keys, scratch);
    if (in_spans && !add_spans(call, scratch, unit)) continue;
    for (int g = 0; g < unit.num_groups; ++g)
      store_output<Element>(call.p, unit.qs, call.unit, unit.groups[g]);
  }
}

template <Orientation kOrientation, Variant kVariant, class Element>
void work(void* context, int worker) {
  ForwardCall& call = *static_cast<ForwardCall*>(context);
  Real* scratch = call.scratch(worker);
  const ThreadState<kOrientation> state;
  for (;;) {
    const int64_t unit = __atomic_fetch_add(&call.next_unit, 1, __ATOMIC_RELAXED);
    if (unit >= call.grid.units) return;
    run_unit<kOrientation, kVariant, Element>(call, unit, scratch);
  }
}

int64_t forward_workspace_bytes(const ForwardParams& p, int num_workers) {
  return SpanLayout::of(p).bytes() + num_workers * WorkspaceLayout::of(p).bytes();
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
                   SpanLayout::of(p),
                   UnitGrid::of(p, shared ? launch.workers->count() : 1),
                   unit,
                   Real(p.softmax_scale * (unit.to_log2 == 1 ? M_LOG2E : 1.0)),
                   static_cast<char*>(launch.workspace),
                   0};
  std::memset(call.spans_done(), 0, sizeof(int32_t) * call.spans.counters());
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
