// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "cuda/sm90/pair_tiles.h"
#include "primitives/ptx/mbarrier.cuh"
#include "primitives/ptx/tma.cuh"

namespace flash::cuda::sm90 {

/// One thread: the tile of a bias or mask at a block of queries and one of keys; its bytes are
/// counted on `full`.
template <class Traits>
FLASH_DEVICE void load_pair_tile(const PairTiles& pairs, const uint8_t* tile, uint64_t* full,
                                 int m_block, int n_block, int head, int batch) {
  const auto load = [&]<class T>(T) {
    using Layout = PairTileLayout<T, Traits::kBlockM, Traits::kBlockN>;
    ptx::mbarrier_expect_bytes(full, Layout::kBoxes * Layout::kBoxBytes);
#pragma unroll
    for (int box = 0; box < Layout::kBoxes; ++box)
      ptx::tma_load_4d(shared_address(tile) + box * Layout::kBoxBytes, pairs.map, full,
                       n_block * Traits::kBlockN + box * Layout::kBoxCols,
                       m_block * Traits::kBlockM, head, batch, ptx::kEvictFirst);
  };
  if (pairs.kind == PairKind::kBias)
    load(typename Traits::Element());
  else
    load(uint8_t());
}

}  // namespace flash::cuda::sm90
