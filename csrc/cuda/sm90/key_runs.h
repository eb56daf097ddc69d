// SPDX-License-Identifier: BSD-3-Clause
// A bool mask that is the same for all queries takes keys away: padding, as a rule, from one end of
// a sequence. What it keeps in one run needs no mask, only a begin and an end, as a packed sequence
// has: its tiles are those of the plain variant, and TMA reads zeros behind the end (numerics,
// contract 3). Host only, but for the structs.
#pragma once

#include "attention/params.h"

namespace flash::cuda::sm90 {

/// Keys that one row of the mask keeps: none outside of [begin, end).
struct alignas(8) KeyRun {
  int end;
  unsigned begin : 31, has_holes : 1;  ///< some inside are dropped
};

/// Of all rows (batch, head) of the mask; a dimension that it broadcasts has a stride of 0. Null:
/// tiles are not cut.
struct KeyRuns {
  KeyRun* run = nullptr;
  int* count = nullptr;  ///< of rows without holes, of rows with some
  int batch_stride = 0, head_stride = 0;

  FLASH_HOST_DEVICE KeyRun& of(int batch, int head) const {
    return run[batch * batch_stride + head * head_stride];
  }
};

/// Whether there is such a mask, and TMA can end K and V at any row.
bool has_key_runs(const ForwardParams& p);
/// Whether a tile without holes needs nothing else of the general variant.
bool runs_are_plain(const ForwardParams& p);

/// Places in the workspace of a forward that has them; filled by find_key_runs.
KeyRuns key_runs(const ForwardParams& p, void* workspace);
void find_key_runs(const ForwardParams& p, const KeyRuns& runs, void* stream);

/// Layout of K and V for TMA where every tile ends its keys itself.
SequenceLayout cut_to_runs(const SequenceLayout& keys);

}  // namespace flash::cuda::sm90
