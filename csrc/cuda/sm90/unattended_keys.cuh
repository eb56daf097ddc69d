// SPDX-License-Identifier: BSD-3-Clause
// Keys that no query attends, and that no result may depend on (numerics, contract 3).
#pragma once

#include "cuda/common/pair_score.cuh"

namespace flash::cuda::sm90 {

/// Whether there may be any: a mask or a bias that is the same for every query can take keys away
/// from all of them.
FLASH_DEVICE bool has_unattended_keys(const ForwardParams& p) {
  const ScoreMod& mod = p.features.score_mod;
  return (mod.mask.data && mod.mask.q_stride == 0) || (mod.bias.data && mod.bias.q_stride == 0);
}

/// Row of a tile of kRows rows in kChunks chunks = 0; before wgmma reads it, fence_proxy_async.
template <int kRows, int kChunks>
FLASH_DEVICE void clear_row(uint16_t* tile, int row) {
  for (int c = 0; c < kChunks; ++c) {
    auto* line = reinterpret_cast<uint4*>(tile + (c * kRows + row) * 64);
    for (int i = 0; i < 8; ++i) line[i] = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace flash::cuda::sm90
