// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "attention/mask.h"

namespace flash {

/// Rows that stand one after another in a buffer and whose positions in the whole sequence are
/// start, start + stride, ... A context-parallel shard is a short list of runs: contiguous 1,
/// zigzag 2, striped 1 of stride P.
struct PositionRun {
  int start, length, stride;
};

/// The part of the mask "q + lower <= k <= q + upper, in positions" that lies between a run of
/// queries and a run of keys of the same stride s. It is an IntervalMask again, in run coordinates
/// i and j:
///   k0 + j s >= q0 + i s + lower   <=>   j >= i + ceil((q0 - k0 + lower) / s)
///   k0 + j s <= q0 + i s + upper   <=>   j <= i + floor((q0 - k0 + upper) / s)
/// so a kernel needs no new loop bounds for a sharded sequence: one outer loop over the key runs is
/// enough.
FLASH_HOST_DEVICE int floor_div(int a, int b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

FLASH_HOST_DEVICE IntervalMask run_mask(PositionRun q, PositionRun k, int lower, int upper) {
  IntervalMask mask{q.length, k.length};
  const int shift = q.start - k.start;
  if (lower > -IntervalMask::kUnbounded) mask.lower = -floor_div(-(shift + lower), q.stride);
  if (upper < IntervalMask::kUnbounded) mask.upper = floor_div(shift + upper, q.stride);
  return mask;
}

}  // namespace flash
