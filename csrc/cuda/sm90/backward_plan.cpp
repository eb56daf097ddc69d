// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm90/backward_plan.h"

#include <algorithm>
#include <cmath>

#include "cuda/device.h"
#include "cuda/sm90/support.h"

namespace flash::cuda::sm90 {
namespace {

bool is_general(const BackwardParams& p) { return p.variant() == Variant::kGeneral; }

/// Above head dim 128 always; at 96 and 128 where S and dP twice cost less than ordered sums of dQ:
/// in short sequences, and in longer ones of causal groups, whose tiles are few. Two kernels
/// against one, 16k tokens on one H200: full 256 +5 to 14 %, 512 -5 to -13 %; causal 256 +1 to 26
/// %, 512 of 96 0, of 128 -8 %; causal groups of 4 of 96 512 +9 %, 1k 0, of 128 512 to 2k +17 %.
bool is_separate(const BackwardParams& p) {
  const int head_dim = backward_head_dim(p);
  if (head_dim > 128) return true;
  if (head_dim == 64 || is_general(p) || !p.deterministic) return false;
  const bool is_grouped = is_causal(p) && p.gqa_ratio() > 1;
  return p.k_layout.max <= (!is_grouped ? 256 : head_dim == 128 ? 2048 : 512);
}

/// Whether the converting warps have time to make lse and delta too: that grows with the blocks of
/// keys that add to a block of queries. Full 512 -3 to -9 %, 1k to 4k +2 to 5 %; causal 512 -5 to
/// -12 %, 1k 0 to -5 %, 2k +3 to 8 %, 4k -1 to +3 %; 8k -2 to +3 %; 16k, where the pass is 1 % of
/// the time, -1 to -4 %.
bool prepares_inside(const BackwardParams& p) {
  if (is_general(p) || is_separate(p)) return false;
  const int64_t window = int64_t{p.mask.window_left} + p.mask.window_right + 1;
  const int64_t keys = std::min(int64_t{p.k_layout.max}, window);
  return keys >= (is_causal(p) ? 2048 : 1024) && keys <= 8192;
}

bool is_bounded(int window) { return window < IntervalMask::kUnbounded; }

/// Key heads of a section (see backward_tile): as many as have about `rounds` tiles for every SM,
/// but sections are about equal, since a small one at the end leaves SMs idle (grouped causal 4k:
/// four sections of 4 heads +18 to 27 %, three of 5 and one of 1 -4 to -6 %). Else 1. Measured on
/// one H200 against sections of one head; docs/hopper.md has more.
///   ordered  The key block before has added when one of the same head begins: head dim 64 full +8
///            to +37 %, causal +2 to +26 %; 128 full +8 to +22 %, causal +8 to +13 %. With twice as
///            many rounds the ring leaves L2: -5 to -25 % at head dim 128.
///   grouped  Causal: tiles are long, heavy ones of all heads first.
int section_heads(const BackwardParams& p, int num_n_blocks) {
  if (is_separate(p)) return 1;
  const bool is_d64 = backward_head_dim(p) == 64;
  const bool is_band = is_bounded(p.mask.window_left) && is_bounded(p.mask.window_right);
  double rounds = 0;
  if (p.deterministic) {
    if (!is_band) rounds = (is_d64 ? 3. : is_causal(p) ? 1. : 2.) / p.gqa_ratio();
  } else if (is_causal(p) && p.gqa_ratio() > 1) {
    rounds = 1;
  }
  if (rounds == 0) return 1;
  const int heads = p.batch * p.num_heads_k;
  const double all_rounds = double(heads) * num_n_blocks / num_multiprocessors();
  const int sections = std::max(int(std::lround(all_rounds / rounds)), 1);
  return std::max((heads + sections - 1) / sections, 1);
}

/// Heads of the last section, if those before have one head and its heavy tiles come first: causal,
/// as many as have about one tile of `blocks` for every SM. Head by head the heavy tiles of the
/// last one end alone. By a model of that +4 to 6 % at head dim 128, +2 to 3 % at 64; measured 128
/// 1k to 8k +3 to 6 %, 16k +1 %; 64 +2 to 3 %, 16k 0; 256 +1 to 4 %, 16k 0; 512 -2 to +3 %. Twice
/// and four times as many: the same.
int ending_heads(const BackwardParams& p, int heads, int blocks) {
  if (!is_causal(p) || heads == 0 || blocks == 0) return 1;
  return std::clamp(int(std::lround(double(num_multiprocessors()) / blocks)), 1, heads);
}

}  // namespace

BackwardPlan make_backward_plan(const BackwardParams& p) {
  const auto round_up = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  const int head_dim = backward_head_dim(p);
  BackwardPlan plan{};
  plan.is_separate = is_separate(p);
  plan.prepares_inside = prepares_inside(p);
  const bool is_wide = plan.is_separate || (head_dim == 64 && !is_general(p));
  const int block_m = is_wide ? 128 : 64, block_n = plan.is_separate ? 64 : 128;
  plan.num_m_blocks = (p.q_layout.max + block_m - 1) / block_m;
  plan.num_n_blocks = (p.k_layout.max + block_n - 1) / block_n;
  plan.num_tiles = plan.num_n_blocks * p.num_heads_k * p.batch;
  const int heads = p.batch * p.num_heads, heads_k = p.batch * p.num_heads_k;
  plan.section_heads = section_heads(p, plan.num_n_blocks);
  const int rest = heads_k % plan.section_heads;
  plan.last_section_heads = rest > 0 ? rest : plan.section_heads;
  plan.last_first = p.deterministic && is_bounded(p.mask.window_right) && !plan.is_separate;
  if (plan.section_heads == 1 && !plan.last_first)
    plan.last_section_heads = ending_heads(p, heads_k, plan.num_n_blocks);
  plan.last_query_heads = ending_heads(p, heads, plan.num_m_blocks);
  if (!plan.is_separate) {
    // Heads in work at a time (the longest tile of a causal head is twice the mean one), and as
    // many being converted. With half of that, tiles wait: 445 instead of 528 at causal 4k.
    const int in_work =
        (is_causal(p) ? 2 : 1) * num_multiprocessors() / std::max(plan.num_n_blocks, 1) + 1;
    // A section, while the one before is converted: with half of that, -10 to -17 %.
    const int key_slots =
        std::max({in_work * 2 + 1, plan.section_heads * 2, plan.last_section_heads});
    plan.dq_slots = std::min(heads, key_slots * p.gqa_ratio());
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
