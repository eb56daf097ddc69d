// SPDX-License-Identifier: BSD-3-Clause
// What the general variant does to the scores and weights of a warpgroup.
#pragma once

#include "cuda/sm90/staged_pairs.cuh"
#include "cuda/sm90/traits.cuh"

namespace flash::cuda::sm90 {

/// The features of one tile at the rows `row` and `row` + 8 of this thread. Made where it is used,
/// from what the loop keeps anyway: coordinates of its own would cost registers.
template <class Traits>
struct GeneralScores {
  using Element = typename Traits::Element;
  using Staged = StagedPairs<Traits::kBlockM, Traits::kBlockN, BlockRows::kQueries>;

  const ForwardParams& p;
  const TileId& tile;
  int row;
  PairKind staged;       ///< which tensor has a tile in shared memory
  uint32_t staged_tile;  ///< its address

  /// S = q.k becomes the scores that enter the softmax; `column` is that of accS[0].
  template <int kCount>
  FLASH_DEVICE void modify(float (&accS)[kCount], int column) const {
    static_assert(kCount % ScoreBlock::kCount == 0, "a block of scores spans 32 keys");
    const float scale = static_cast<float>(p.softmax_scale);
    const int tile_row = row - tile.m_block * Traits::kBlockM;
    // As the diagonal knows it: a mask may have cut the keys of the tile.
    const int seqlen_k = p.mask.bottom_right ? tile.q.length + tile.diagonal : tile.k.length;
#pragma unroll
    for (int j = 0; j < kCount; j += ScoreBlock::kCount) {
      const auto products = ScoreBlock::of([&](int i) { return accS[j + i] * scale; });
      const BlockPlace<Element, BlockRows::kQueries, Staged> place{
          p,        tile.batch, tile.head,      tile.q.length,
          seqlen_k, row,        column + 2 * j, {staged, staged_tile, tile_row, 2 * j}};
      const ScoreBlock scores =
          p.features.score_mod.template forward<float, ScoreBlock>(products, place).score;
#pragma unroll
      for (int i = 0; i < ScoreBlock::kCount; ++i) accS[j + i] = scores.x[i];
    }
  }
  FLASH_DEVICE bool has_dropout() const { return p.features.dropout.enabled(); }
  FLASH_DEVICE float dropout_scale() const {
    return has_dropout() ? static_cast<float>(p.features.dropout.scale) : 1.f;
  }
  /// Zeroes dropped weights. One Philox call serves the eight elements of a ScoreBlock whose
  /// columns have the same parity.
  template <int kCount>
  FLASH_DEVICE void drop(float (&accP)[kCount], int column) const {
    const auto stream = DropoutStream::of(p.features.dropout, tile.batch, tile.head, p.num_heads);
#pragma unroll
    for (int j = 0; j < kCount; j += ScoreBlock::kCount)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const PhiloxBlock bits = stream.block(row, column + j * 2 + c);
#pragma unroll
        for (int i = c; i < ScoreBlock::kCount; i += 2)
          if (!stream.keeps(bits, ScoreBlock::row(i) / 8, i / 4)) accP[j + i] = 0.f;
      }
  }
  FLASH_DEVICE bool has_sink() const { return p.features.sink.enabled(); }
  FLASH_DEVICE float sink() const { return p.features.sink.template of<float>(tile.head); }
};

}  // namespace flash::cuda::sm90
