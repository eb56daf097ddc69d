// SPDX-License-Identifier: BSD-3-Clause
//
// FlashAttention-2, Algorithm 2, for one block of keys of one kv head:
//   for each query head that shares it, for each chunk of queries, the last first:
//     S = Q K^T,  dP = dO V^T
//     P = exp(S - lse),  dS = P o (dP - delta)     weigh_pairs, with the features
//     dV += P^T dO,  dK += dS^T Q
//     dQ += dS K                                   in the order of the blocks
// The products are those of BlockOperands (backward_panels.h, for bf16 backward_pairs.h). dK and dV
// of the block stay with the worker, dQ with the head; each is rounded once. dS carries
// softmax_scale. A chunk counts the blocks that have added to it, and a block waits for its turn,
// so the sums are those of one worker whatever the number of workers. A block only waits for
// earlier ones, which have been taken by running workers: nobody waits for ever.
#pragma once

#include "cpu/backward_pack.h"
#include "cpu/key_lanes.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif

namespace flash::cpu {
namespace {

void wait_for_turn(const int32_t* blocks_done, int block) {
  for (int spins = 0; __atomic_load_n(blocks_done, __ATOMIC_ACQUIRE) != block; ++spins) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
#if defined(__unix__) || defined(__APPLE__)
    if (spins > 2000) sched_yield();
#endif
  }
}

/// Where the rows of a chunk meet a block of keys; false if they do not.
bool meet(const KvHead& head, const Chunk& chunk, int block, Step& step) {
  const IntervalMask& mask = head.mask;
  const int first = chunk.first_row, k_begin = block * kBlockKeys;
  const int k_end = smaller(k_begin + kBlockKeys, mask.seqlen_k);
  Range any = mask.any_keys(first, first + chunk.rows);
  if (any.begin >= k_end || any.end <= k_begin) return false;
  const Range all = mask.all_keys(first, first + chunk.rows);
  step.chunk = chunk;
  step.k_begin = k_begin;
  step.rows = {0, chunk.rows};
  step.pairs = Pairs::kAllKept;
  if (all.begin > k_begin || all.end < k_end || *chunk.flags & Chunk::kHasEmptyRow) {
    step.pairs = Pairs::kInterval;
    int& begin = step.rows.begin;
    int& end = step.rows.end;
    while (begin < end && mask.key_end(first + begin) <= k_begin) ++begin;
    while (begin < end && mask.key_begin(first + end - 1) >= k_end) --end;
    // Whole tiles, and with features also the whole rows of 16 that dropout decides together.
    constexpr int kRowsOfBoth = kRowStep % 16 == 0 ? kRowStep : 8 * kRowStep;
    const int start = head.variant == Variant::kGeneral ? kRowsOfBoth : kRowStep;
    begin = begin / start * start;
    end = smaller(round_up(end, kRowStep), chunk.rows);
    any = mask.any_keys(first + begin, first + end);
  }
  step.is_cut = step.pairs == Pairs::kInterval;
  if (head.variant == Variant::kGeneral) step.pairs = Pairs::kGeneral;
  step.keys = {larger(any.begin, k_begin) - k_begin, smaller(any.end, k_end) - k_begin};
  step.covers_all = step.rows.begin == 0 && step.rows.end == chunk.rows && step.keys.begin == 0 &&
                    step.keys.end == k_end - k_begin && !(step.is_cut && kRowsOfCut < chunk.rows);
  return true;
}
/// The rows [begin, end) of a step, with the keys that these meet; false if there are none.
bool cut(const KvHead& head, const Step& step, int begin, int end, Step& part) {
  part = step;
  part.rows = {begin, end};
  if (!step.is_cut) return true;
  const int first = step.chunk.first_row;
  const Range any = head.mask.any_keys(first + begin, first + end);
  part.keys = {larger(any.begin - step.k_begin, step.keys.begin),
               smaller(any.end - step.k_begin, step.keys.end)};
  return part.keys.begin < part.keys.end;
}

/// What of the scale S is still to be multiplied by.
FLASH_INLINE Vector scaled(const BlockOperands& block, Vector score) {
  return kHasPairs ? score * splat(block.scale_of_scores) : score;
}

/// P = exp(S - lse) and dS = softmax_scale P o (dP - delta), in place, where there is nothing but
/// an interval of keys.
template <Pairs kPairs>
FLASH_NOINLINE void weigh_plain_pairs(const KvHead& head, const Step& step,
                                      const BlockOperands& block) {
  Real *const p = block.p, *const ds = block.ds;
  const Vector scale = splat(Real(head.task.p.softmax_scale));
  const int begin = step.keys.begin / kLanes * kLanes;
  for (int i = step.rows.begin; i < step.rows.end; ++i) {
    const Vector lse = splat(step.chunk.lse[i]), delta = splat(step.chunk.delta[i]);
    const int q = step.chunk.first_row + i;
    IntVector key_begin{}, key_end{};
    if constexpr (kPairs == Pairs::kInterval) {
      const bool is_empty = step.chunk.lse[i] == kInfinity;
      key_begin = key_begin + Int(head.mask.key_begin(q) - step.k_begin);
      key_end = key_end + (is_empty ? Int(-kBlockKeys) : Int(head.mask.key_end(q) - step.k_begin));
    }
    for (int j = begin; j < step.keys.end; j += kLanes) {
      const int64_t at = i * kScorePitch + j;
      Vector weight = exp2_bounded(not_above_zero(scaled(block, load(p + at)) - lse));
      Vector gradient = weight * scale * (load(ds + at) - delta);
      if constexpr (kPairs == Pairs::kInterval) {
        const IntVector index = lane_numbers() + Int(j);
        const IntVector kept = (index >= key_begin) & (index < key_end);
        weight = select(kept, weight, splat(0));
        gradient = select(kept, gradient, splat(0));
      }
      store(p + at, weight);
      store(ds + at, gradient);
    }
  }
}

/// Clears the part of dbias that is a chunk's and a block's own, before what they keep is written.
void clear_bias_block(const KvHead& head, const Chunk& chunk, int n) {
  const int k_begin = n * kBlockKeys, bytes = element_bytes(head.bias.dtype);
  const int64_t width = smaller(kBlockKeys, head.mask.seqlen_k - k_begin);
  for (int i = 0; i < chunk.rows; ++i) {
    const int64_t at =
        k_begin + head.bias.row(head.batch, head.query_head(chunk.head), chunk.first_row + i);
    std::memset(static_cast<char*>(head.bias.data) + at * bytes, 0, width * bytes);
  }
}
/// Adds one row of dS to the gradient of the bias.
void add_bias_row(const BiasGradient& bias, int64_t at, Range keys, const Real* ds) {
  if (!bias.sums) {
    write_row(bias.dtype, bias.data, at + keys.begin, keys.end - keys.begin, ds + keys.begin);
  } else {
    for (int j = keys.begin; j < keys.end; ++j) bias.sums[at + j] += ds[j];
  }
}

/// The same with every feature; what dS means for bias, slopes and lse goes where it belongs.
/// Returns the step's part of the gradient of the ALiBi slope.
FLASH_NOINLINE Real weigh_general_pairs(const KvHead& head, const Step& step, PairRow& row,
                                        Real* row_sums, const BlockOperands& block) {
  Real *const p = block.p, *const ds = block.ds;
  const ForwardParams& params = head.task.p;
  const ScoreMod mod = params.features.score_mod;  // a copy: the loop's stores cannot change it
  const int h = head.query_head(step.chunk.head);
  const bool of_weights = head.task.of_weights();
  const bool has_dropout = params.features.dropout.enabled();
  const bool adds_bias = head.bias.data && !head.bias.over_keys;
  const Vector scale = splat(Real(params.softmax_scale));
  const int begin = step.keys.begin / kLanes * kLanes;
  KeyLanes lanes(params, head.mask, head.batch, h, step.k_begin, step.keys, row);
  Vector slope_sum = splat(0);
  for (int i = step.rows.begin; i < step.rows.end; ++i) {
    const int q = step.chunk.first_row + i;
    const Real lse = step.chunk.lse[i];
    const Vector delta = splat(step.chunk.delta[i]);
    Vector row_sum = splat(0);
    alignas(64) Real score_gradient[kBlockKeys];
    const KeyRow keys = lanes.enter_row(q, lse);
    for (int j = begin; j < step.keys.end; j += kLanes) {
      const int64_t at = i * kScorePitch + j;
      const WeightVector w = keys.weigh(mod, j, scaled(block, load(p + at)), lse, !of_weights);
      Vector weight = w.weight, dp = load(ds + at);
      if (has_dropout) {
        const Vector factor = keys.dropout_factor(j);
        weight = select(w.dropped, splat(0), weight * factor);
        dp *= factor;
      }
      const Vector gradient = select(w.dropped, splat(0), w.weight * (dp - delta));
      row_sum += gradient;
      if (mod.alibi_slopes) slope_sum -= gradient * keys.distance(j);
      if (adds_bias) store(score_gradient + j, gradient);
      store(p + at, weight);
      store(ds + at, mod.backward(gradient, w.slope) * scale);
    }
    row_sums[i] = sum_of_lanes(row_sum);
    if (adds_bias) {
      add_bias_row(head.bias, head.bias.row(head.batch, h, q) + step.k_begin, step.keys,
                   score_gradient);
    }
  }
  return sum_of_lanes(slope_sum);
}

/// dP = dW of the chunk's rows, divided by the number of heads where W was averaged.
void read_weight_gradients(const KvHead& head, const Step& step, Real* dp) {
  const GradientTask& task = head.task;
  const int64_t heads = task.average ? 1 : task.p.num_heads;
  const int64_t h = task.average ? 0 : head.query_head(step.chunk.head);
  const Real factor = task.average ? Real(1) / Real(task.p.num_heads) : Real(1);
  for (int i = step.rows.begin; i < step.rows.end; ++i) {
    const int64_t row = (head.batch * heads + h) * task.p.q_layout.max + step.chunk.first_row + i;
    Real* to = dp + i * kScorePitch;
    for (int j = 0; j < kBlockKeys; ++j) to[j] = 0;
    read_row(task.p.dtype, task.dweights,
             row * task.p.k_layout.max + step.k_begin + step.keys.begin, 1,
             step.keys.end - step.keys.begin, to + step.keys.begin);
    for (int j = 0; j < kBlockKeys; ++j) to[j] *= factor;
  }
}

/// A block of keys in work.
struct KeyBlock {
  BlockOperands operands;
  PairRow& row;
  bool is_finite;
};

/// S, dP, P and dS of some rows of a step. Returns their part of the gradient of the ALiBi slope.
Real weigh(const KvHead& head, const Step& step, const KeyBlock& block, Real* row_sums) {
  const BlockOperands& s = block.operands;
  Real slope_sum = 0;
  s.multiply_scores(step);
  if (head.task.of_weights()) {
    read_weight_gradients(head, step, s.ds);
  } else if (head.task.wants_ds()) {
    s.multiply_gradients(step);
  }
  switch (step.pairs) {
    case Pairs::kAllKept:
      weigh_plain_pairs<Pairs::kAllKept>(head, step, s);
      break;
    case Pairs::kInterval:
      weigh_plain_pairs<Pairs::kInterval>(head, step, s);
      break;
    case Pairs::kGeneral:
      slope_sum = weigh_general_pairs(head, step, block.row, row_sums, s);
      break;
  }
  s.round_weights(step);
  return slope_sum;
}

/// One chunk against the block: at once, or, where the mask cuts the step, kRowsOfCut rows after
/// each other without the corners that it leaves out. Returns the part of the gradient of the ALiBi
/// slope.
Real run_step(const KvHead& head, int n, const Step& step, const KeyBlock& block) {
  const GradientTask& task = head.task;
  const BlockOperands& s = block.operands;
  Real slope_sum = 0;
  alignas(64) Real row_sums[kChunkQueries] = {};
  Step parts[kChunkQueries / kRowsOfCut];
  int num_parts = 0;
  const int at_once = step.is_cut ? kRowsOfCut : kChunkQueries;
  for (int begin = step.rows.begin; begin < step.rows.end; begin += at_once) {
    Step& part = parts[num_parts];
    if (!cut(head, step, begin, smaller(begin + at_once, step.rows.end), part)) continue;
    slope_sum += weigh(head, part, block, row_sums);
    ++num_parts;
  }
  const bool by_pairs =
      step.pairs != Pairs::kAllKept && (!block.is_finite || *step.chunk.flags & Chunk::kNotFinite);
  for (int i = 0; i < num_parts; ++i) {
    if (task.dv.data) s.add_to_values(parts[i], by_pairs);
    if (task.dk.data) s.add_to_keys(parts[i], by_pairs);
  }
  const bool adds_row_sums = task.lse_gradient.data || head.bias.over_keys;
  if (task.dq.data || adds_row_sums) {
    wait_for_turn(step.chunk.blocks_done, n);
    for (int i = 0; task.dq.data && i < num_parts; ++i) s.add_to_queries(parts[i], by_pairs);
    if (adds_row_sums) {
      for (int i = step.rows.begin; i < step.rows.end; ++i) step.chunk.row_sums[i] += row_sums[i];
    }
    __atomic_store_n(step.chunk.blocks_done, n + 1, __ATOMIC_RELEASE);
  }
  return slope_sum;
}

/// dK and dV of block n, and its part of everything else.
void run_block(const KvHead& head, int n, KeyBlock& block) {
  block.is_finite = block.operands.load_block(head, n);
  const HeadScratch& scratch = head.scratch;
  for (int g = 0; g < head.task.p.gqa_ratio(); ++g) {
    Real slope_sum = 0;
    for (int c = scratch.num_chunks - 1; c >= 0; --c) {
      const Chunk chunk = scratch.chunk(g, c, head.mask.seqlen_q);
      Step step;
      const bool is_met = meet(head, chunk, n, step);
      if (head.bias.clears_blocks && !(is_met && step.covers_all)) clear_bias_block(head, chunk, n);
      if (is_met) slope_sum += run_step(head, n, step, block);
    }
    scratch.slope_sums[int64_t(g) * scratch.num_blocks + n] = slope_sum;
  }
  block.operands.store_block(head, n);
}

}  // namespace
}  // namespace flash::cpu
