// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm90/backward_plan.h"

#include <algorithm>

#include "cuda/device.h"
#include "cuda/sm90/support.h"

namespace flash::cuda::sm90 {
namespace {

BackwardRow choose_row(const BackwardParams& p) {
  const int length = p.k_layout.max;
  const int head_dim = backward_head_dim(p);
  if (head_dim > 128) return BackwardRow::kSeparate;
  if (p.variant() == Variant::kGeneral) return BackwardRow::kGeneral;
  // Measured on one H200. Head dims 96 and 128, where S and dP twice cost less than ordered sums of
  // dQ: full +7 to +21 % from 512 to 2k, causal 0 to 4 % at 2k. Where sums are not ordered: causal
  // 512 -8 % at head dim 128 and 0 at 96, 1k -13 % at 96.
  if (head_dim > 64 && p.deterministic && length <= 2048) return BackwardRow::kSeparate;
  if (head_dim == 96) return BackwardRow::kD128;
  if (!p.deterministic)  // the other rows at 4k to 16k: 0 to -4 %, full 2k at head dim 64 -4 %
    return head_dim == 64 ? BackwardRow::kD64Short : BackwardRow::kD128Short;
  // Ordered: the short rows at causal 1k +2 %, 4k -1 %; full 2k -2 %, 4k -3 %.
  if (head_dim == 64)
    return length <= (is_causal(p) ? 2048 : 1024) ? BackwardRow::kD64Short : BackwardRow::kD64;
  if (is_causal(p)) return length < 8192 ? BackwardRow::kD128Short : BackwardRow::kD128;
  return BackwardRow::kD128;
}

/// Whether the converting warps have time to make lse and delta too: that grows with the blocks of
/// keys that add to a block of queries. Full 512 -3 to -9 %, 1k to 4k +2 to 5 %; causal 512 -5 to
/// -12 %, 1k 0 to -5 %, 2k +3 to 8 %, 4k -1 to +3 %; 8k -2 to +3 %; 16k, where the pass is 1 % of
/// the time, -1 to -4 %.
bool prepares_inside(const BackwardParams& p, BackwardRow row) {
  if (row == BackwardRow::kGeneral || row == BackwardRow::kSeparate) return false;
  const int64_t window = int64_t{p.mask.window_left} + p.mask.window_right + 1;
  const int64_t keys = std::min(int64_t{p.k_layout.max}, window);
  return keys >= (is_causal(p) ? 2048 : 1024) && keys <= 8192;
}

}  // namespace

BackwardPlan make_backward_plan(const BackwardParams& p) {
  const auto round_up = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  const int head_dim = backward_head_dim(p);
  BackwardPlan plan{};
  plan.row = choose_row(p);
  plan.prepares_inside = prepares_inside(p, plan.row);
  const bool is_separate = plan.row == BackwardRow::kSeparate;
  const bool is_d64 = plan.row == BackwardRow::kD64 || plan.row == BackwardRow::kD64Short;
  const int block_m = is_d64 || is_separate ? 128 : 64, block_n = is_separate ? 64 : 128;
  plan.num_m_blocks = (p.q_layout.max + block_m - 1) / block_m;
  plan.num_n_blocks = (p.k_layout.max + block_n - 1) / block_n;
  plan.num_tiles = plan.num_n_blocks * p.num_heads_k * p.batch;
  plan.last_first = p.deterministic && is_causal(p) && !is_separate;
  const int heads = p.batch * p.num_heads;
  if (!is_separate) {
    // Heads in work at a time (the longest tile of a causal head is twice the mean one), and as
    // many being converted. With half of that, tiles wait: 445 instead of 528 at causal 4k.
    const int in_work =
        (is_causal(p) ? 2 : 1) * num_multiprocessors() / std::max(plan.num_n_blocks, 1) + 1;
    plan.dq_slots = std::min(heads, (in_work * 2 + 1) * p.gqa_ratio());
    // The ring counts additions by generations of as many key blocks each.
    if (is_ragged(p)) plan.dq_slots = heads;
  }
  plan.rows = plan.num_m_blocks * block_m;
  const int64_t rows = int64_t{heads} * plan.rows;
  const int64_t sums = int64_t{plan.dq_slots} * plan.rows * head_dim;
  const int64_t counters = int64_t{plan.dq_slots} * (plan.num_m_blocks + 1);
  plan.delta_at = round_up(rows * 4);
  plan.dq_sums_at = plan.delta_at + round_up(rows * 4);
  plan.counters_at = plan.dq_sums_at + round_up(sums * 4);
  plan.bytes = plan.counters_at + round_up(int64_t{sizeof(DrawnWork)} + counters * 4);
  return plan;
}

int64_t backward_workspace_bytes(const BackwardParams& p) { return make_backward_plan(p).bytes; }

}  // namespace flash::cuda::sm90
