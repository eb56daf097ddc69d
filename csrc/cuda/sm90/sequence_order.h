// SPDX-License-Identifier: BSD-3-Clause
// The host does not know how long the sequences of a ragged batch are. A kernel before the forward
// sorts them, so that long ones begin first and no tile is empty.
#pragma once

#include "attention/params.h"

namespace flash::cuda::sm90 {

/// Null: the batch is not ragged.
struct SequenceOrder {
  int* batch = nullptr;        ///< by rank, the most keys first; nearly equal ones in any order
  int* first_block = nullptr;  ///< by rank: blocks of queries before it; (batch + 1)
};

/// Its place in the workspace of a forward, and whether it has one.
SequenceOrder sequence_order(const ForwardParams& p, void* workspace);

/// For blocks of `block_queries` queries. `next_tile` becomes 0.
void order_sequences(const ForwardParams& p, int block_queries, const SequenceOrder& order,
                     unsigned* next_tile, void* stream);

}  // namespace flash::cuda::sm90
