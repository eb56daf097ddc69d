// SPDX-License-Identifier: BSD-3-Clause
//
// FlashAttention-2, Algorithm 2, for one block of keys of one kv head:
//   for each query head that shares it, for each chunk of queries, the last first:
//     S = Q K^T,  dP = dO V^T                      score_product
//     P = exp(S - lse),  dS = P o (dP - delta)     weigh_pairs, with the features
//     dV += P^T dO,  dK += dS^T Q                  add_product on columns
//     dQ += dS K                                   add_product on rows, in the order of the blocks
// dK and dV of the block stay with the worker, dQ with the head; each is rounded once. dS carries
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

/// What weigh_pairs has to look at.
enum class Pairs { kAllKept, kInterval, kGeneral };

/// A chunk's rows and a block's keys, cut to those that meet. Rows count from the chunk's first,
/// keys from the block's.
struct Step {
  Chunk chunk;
  int k_begin;
  Range rows, keys;
  Pairs pairs;
  bool covers_all;  ///< rows and keys are all there are
};

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
    const int start = head.variant == Variant::kGeneral ? 8 * kPanelRows : kPanelRows;
    begin = begin / start * start;
    end = smaller(round_up(end, kPanelRows), chunk.rows);
    any = mask.any_keys(first + begin, first + end);
  }
  if (head.variant == Variant::kGeneral) step.pairs = Pairs::kGeneral;
  step.keys = {larger(any.begin, k_begin) - k_begin, smaller(any.end, k_end) - k_begin};
  step.covers_all = step.rows.begin == 0 && step.rows.end == chunk.rows && step.keys.begin == 0 &&
                    step.keys.end == k_end - k_begin;
  return true;
}

/// P = exp(S - lse) and dS = softmax_scale P o (dP - delta), in place, where there is nothing but
/// an interval of keys.
template <Pairs kPairs>
FLASH_NOINLINE void weigh_plain_pairs(const KvHead& head, const Step& step, Real* p, Real* ds) {
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
      Vector weight = exp2_bounded(not_above_zero(load(p + at) - lse));
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
                                        Real* row_sums, Real* p, Real* ds) {
  const ForwardParams& params = head.task.p;
  const ScoreMod mod = params.features.score_mod;  // a copy: the loop's stores cannot change it
  const int h = head.query_head(step.chunk.head);
  const bool of_weights = head.task.of_weights();
  const bool has_dropout = params.features.dropout.enabled();
  const bool adds_bias = head.bias.data && !head.bias.over_keys;
  const Vector scale = splat(Real(params.softmax_scale));
  const int begin = step.keys.begin / kLanes * kLanes;
  KeyLanes lanes(params, head.mask, head.batch, h, step.k_begin, row);
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
      const WeightVector w = keys.weigh(mod, j, load(p + at), lse, !of_weights);
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
  BlockScratch scratch;
  PairRow& row;
  bool is_finite;

  /// scores = left right for the keys of the step.
  void score(const Step& step, const Real* left, int width, const Real* right, Real* scores) const {
    const int rows = round_up(step.rows.end, kPanelRows) - step.rows.begin;
    for (int j = step.keys.begin / kPanel * kPanel; j < step.keys.end; j += kPanel) {
      with_vectors(step.keys.end - j, [&]<int kVectors> {
        score_product<kVectors>(left + step.rows.begin * kPanel, int64_t(kChunkQueries) * kPanel,
                                rows, width, right + int64_t(j) * width,
                                scores + step.rows.begin * kScorePitch + j);
      });
    }
  }
  /// sums += transposed(weights) right over the rows of the step, right a packed chunk.
  void add_to_keys(const Step& step, bool by_pairs, const Real* weights, const Real* others,
                   const Real* right, int width, Real* sums) const {
    const int first = step.keys.begin / 2 * 2, keys = round_up(step.keys.end, 2) - first;
    const int rows = step.rows.end - step.rows.begin;
    const int64_t at = step.rows.begin * kScorePitch + first;
    for (int c = 0; c < width; c += kPanel) {
      const Real* panel = right + int64_t(c) * kChunkQueries + step.rows.begin * kPanel;
      Real* to = sums + int64_t(c) * kBlockKeys + first * kPanel;
      if (by_pairs) {
        add_product_of_kept_pairs(weights + at, others + at, 1, kScorePitch, keys, panel, rows, to);
        continue;
      }
      with_vectors(width - c, [&]<int kVectors> {
        add_product<kVectors>(weights + at, 1, kScorePitch, keys, panel, rows, to);
      });
    }
  }
  /// dQ += dS K over the keys of the step.
  void add_to_queries(const Step& step, bool by_pairs, int width) const {
    const int rows = round_up(step.rows.end, kPanelRows) - step.rows.begin;
    const int64_t at = step.rows.begin * kScorePitch + step.keys.begin;
    const int keys = step.keys.end - step.keys.begin;
    for (int c = 0; c < width; c += kPanel) {
      const Real* panel = scratch.k + int64_t(c) * kBlockKeys + step.keys.begin * kPanel;
      Real* to = step.chunk.dq + int64_t(c) * kChunkQueries + step.rows.begin * kPanel;
      if (by_pairs) {
        add_product_of_kept_pairs(scratch.ds + at, scratch.p + at, kScorePitch, 1, rows, panel,
                                  keys, to);
        continue;
      }
      with_vectors(width - c, [&]<int kVectors> {
        add_product<kVectors>(scratch.ds + at, kScorePitch, 1, rows, panel, keys, to);
      });
    }
  }
};

/// One chunk against the block. Returns the part of the gradient of the ALiBi slope.
Real run_step(const KvHead& head, int n, const Step& step, const KeyBlock& block) {
  const GradientTask& task = head.task;
  const ForwardParams& p = task.p;
  const BlockScratch& s = block.scratch;
  Real slope_sum = 0;
  alignas(64) Real row_sums[kChunkQueries];
  block.score(step, step.chunk.q, p.head_dim, s.k_t, s.p);
  if (task.of_weights()) {
    read_weight_gradients(head, step, s.ds);
  } else if (task.wants_ds()) {
    block.score(step, step.chunk.dout, p.head_dim_v, s.v_t, s.ds);
  }
  switch (step.pairs) {
    case Pairs::kAllKept:
      weigh_plain_pairs<Pairs::kAllKept>(head, step, s.p, s.ds);
      break;
    case Pairs::kInterval:
      weigh_plain_pairs<Pairs::kInterval>(head, step, s.p, s.ds);
      break;
    case Pairs::kGeneral:
      slope_sum = weigh_general_pairs(head, step, block.row, row_sums, s.p, s.ds);
      break;
  }
  const bool by_pairs =
      step.pairs != Pairs::kAllKept && (!block.is_finite || *step.chunk.flags & Chunk::kNotFinite);
  if (task.dv.data) {
    block.add_to_keys(step, by_pairs, s.p, s.ds, step.chunk.dout, p.head_dim_v, s.dv);
  }
  if (task.dk.data) block.add_to_keys(step, by_pairs, s.ds, s.p, step.chunk.q, p.head_dim, s.dk);
  const bool adds_row_sums = task.lse_gradient.data || head.bias.over_keys;
  if (task.dq.data || adds_row_sums) {
    wait_for_turn(step.chunk.blocks_done, n);
    if (task.dq.data) block.add_to_queries(step, by_pairs, p.head_dim);
    if (adds_row_sums) {
      for (int i = step.rows.begin; i < step.rows.end; ++i) step.chunk.row_sums[i] += row_sums[i];
    }
    __atomic_store_n(step.chunk.blocks_done, n + 1, __ATOMIC_RELEASE);
  }
  return slope_sum;
}

/// dK and dV of block n, and its part of everything else.
void run_block(const KvHead& head, int n, KeyBlock& block) {
  block.is_finite = load_block(head, n, block.scratch);
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
  store_block(head, n, block.scratch);
}

}  // namespace
}  // namespace flash::cpu
