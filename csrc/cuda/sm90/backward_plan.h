// SPDX-License-Identifier: BSD-3-Clause
// Host side of the backward: one kernel or two, the order of tiles, and what lies where in the
// workspace.
#pragma once

#include "attention/params.h"

namespace flash::cuda::sm90 {

/// What has been drawn so far; 0 at launch. All work of the fused kernel is drawn, in an order in
/// which everything waits only for what was drawn before it, and whoever holds two does them in
/// that order: a CTA that has not started, because another kernel holds its SM, keeps nothing
/// waiting.
struct DrawnWork {
  int tiles, query_tiles;       ///< query_tiles: of queries_kernel
  int opened[2], converted[2];  ///< halves of query blocks, by the converting warps
};

struct BackwardPlan {
  bool is_separate;  ///< dQ by a kernel of its own, without sums of dQ in memory
  int num_m_blocks, num_n_blocks, num_tiles, dq_slots;
  int section_heads, last_section_heads;  ///< key heads, see TileOrder
  int last_query_heads;                   ///< the same of queries_kernel, whose sections are heads
  bool last_first;
  bool prepares_inside;                       ///< no kernel before the main one
  int rows;                                   ///< of lse and delta of a head
  int64_t delta_at, dq_sums_at, counters_at;  ///< bytes from the start; lse_log2 is at 0
  int64_t bytes;
};

BackwardPlan make_backward_plan(const BackwardParams& p);

}  // namespace flash::cuda::sm90
