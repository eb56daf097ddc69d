// SPDX-License-Identifier: BSD-3-Clause
// What masks and the general variant do to the scores and weights of a warpgroup.
#pragma once

#include "cuda/sm90/staged_pairs.cuh"
#include "cuda/sm90/traits.cuh"
#include "primitives/ptx/prmt.cuh"

namespace flash::cuda::sm90 {

/// A bit for every pair of a block that a thread holds: of ScoreBlock b, bit
/// kept_bit(i) - 4 (b % 2) of word b / 2.
template <int kBlockN>
struct PairBits {
  uint32_t word[kBlockN / 64];

  static FLASH_DEVICE constexpr int bit(int block, int i) { return kept_bit(i) - 4 * (block % 2); }
  /// S = -inf where a bit is not set.
  FLASH_DEVICE void apply(float (&accS)[kBlockN / 2]) const {
#pragma unroll
    for (int j = 0; j < kBlockN / 2; ++j) {
      const int block = j / ScoreBlock::kCount;
      if (!(word[block / 2] >> bit(block, j % ScoreBlock::kCount) & 1)) accS[j] = -INFINITY;
    }
  }
  /// The same for weights of 16 bits, = 0. The bits of a register's two elements are 16 apart,
  /// those of tiles in the order of columns from the top of a byte.
  FLASH_DEVICE void apply(uint32_t (&rP)[kBlockN / 4]) const {
#pragma unroll
    for (int j = 0; j < kBlockN / 4; ++j) {
      const int block = 2 * j / ScoreBlock::kCount, i = 2 * j % ScoreBlock::kCount;
      const uint32_t tops = word[block / 2] << (7 - bit(block, i) % 8);
      rP[j] &= j % 2 ? ptx::permute_bytes<0xbb99>(tops) : ptx::permute_bytes<0xaa88>(tops);
    }
  }
};

/// What is known of the pairs of a block without their products.
template <int kBlockN>
struct KnownPairs {
  PairBits<kBlockN> kept, drawn;  ///< by a mask, by dropout
};

/// S = -inf where the mask drops the pair, of the queries of both rows; `column` is that of
/// accS[0].
template <int kCount>
FLASH_DEVICE void apply_interval(float (&accS)[kCount], const IntervalMask& mask,
                                 const int (&queries)[2], int column) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int begin = mask.key_begin(queries[r]) - column;
    const int end = mask.key_end(queries[r]) - column;
#pragma unroll
    for (int j = 0; j < kCount / 2; ++j) {
      const int place = j / 2 * 8 + j % 2;
      if (place < begin || place >= end) accS[j / 2 * 4 + r * 2 + j % 2] = -INFINITY;
    }
  }
}

/// The features of one tile at the rows `row` and `row` + 8 of this thread. Made where it is used,
/// from what the loop keeps anyway: coordinates of its own would cost registers.
template <class Traits>
struct GeneralScores {
  using Element = typename Traits::Element;
  using Staged = StagedPairs<Traits::kBlockM, Traits::kBlockN, BlockRows::kQueries>;

  static constexpr int kBlockN = Traits::kBlockN;

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
  /// What the staged mask keeps.
  FLASH_DEVICE PairBits<kBlockN> kept() const {
    const int tile_row = row - tile.m_block * Traits::kBlockM;
    PairBits<kBlockN> kept{};
#pragma unroll
    for (int b = 0; b < kBlockN / ScoreBlock::kColumns; ++b)
      kept.word[b / 2] |=
          Staged{staged, staged_tile, tile_row, b * ScoreBlock::kColumns}.kept() >> 4 * (b % 2);
    return kept;
  }
  FLASH_DEVICE bool has_dropout() const { return p.features.dropout.enabled(); }
  FLASH_DEVICE float dropout_scale() const {
    return has_dropout() ? static_cast<float>(p.features.dropout.scale) : 1.f;
  }
  /// What dropout keeps. One Philox call serves the eight elements of a ScoreBlock whose columns
  /// have the same parity.
  FLASH_DEVICE PairBits<kBlockN> drawn(int column) const {
    const auto stream = DropoutStream::of(p.features.dropout, tile.batch, tile.head, p.num_heads);
    PairBits<kBlockN> drawn{};
#pragma unroll
    for (int b = 0; b < kBlockN / ScoreBlock::kColumns; ++b)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const PhiloxBlock random = stream.block(row, column + b * ScoreBlock::kColumns + c);
#pragma unroll
        for (int i = c; i < ScoreBlock::kCount; i += 2)
          if (stream.keeps(random, ScoreBlock::row(i) / 8, i / 4))
            drawn.word[b / 2] |= 1u << PairBits<kBlockN>::bit(b, i);
      }
    return drawn;
  }
  FLASH_DEVICE bool has_sink() const { return p.features.sink.enabled(); }
  FLASH_DEVICE float sink() const { return p.features.sink.template of<float>(tile.head); }
};

}  // namespace flash::cuda::sm90
