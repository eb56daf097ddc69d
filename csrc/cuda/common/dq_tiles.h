// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "attention/params.h"

namespace flash::cuda {

/// The gradient of the queries is a sum over key blocks that different CTAs compute: they add to
/// fp32 tiles of block_m rows in the workspace. This says where the tiles lie: heads outermost,
/// then sequences. A sequence of a packed tensor starts at tile first_row / block_m + b, which
/// leaves room for the ragged ends of the b sequences before it.
struct DqTiles {
  int block_m;
  int64_t per_head, per_sequence;

  static FLASH_HOST_DEVICE DqTiles of(const ForwardParams& p, int block_m) {
    const SequenceLayout& layout = p.q_layout;
    const int64_t blocks = (int64_t(layout.max) + block_m - 1) / block_m;
    return {block_m, layout.packed() ? layout.total / block_m + p.batch : blocks * p.batch, blocks};
  }
  FLASH_HOST_DEVICE int64_t count(int num_heads) const { return per_head * num_heads; }
  /// Number of the first tile of a sequence and head.
  FLASH_HOST_DEVICE int64_t first(const SequenceLayout& layout, const Sequence& sequence, int batch,
                                  int head) const {
    return head * per_head +
           (layout.packed() ? sequence.first_row / block_m + batch : per_sequence * batch);
  }
};

/// Of the workspace: a tile's sums, and the counter that orders those who add to it.
constexpr int64_t dq_tile_bytes(int head_dim, int block_m) {
  return int64_t(head_dim) * block_m * 4 + 4;
}

}  // namespace flash::cuda
