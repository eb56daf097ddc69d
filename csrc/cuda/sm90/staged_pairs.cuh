// SPDX-License-Identifier: BSD-3-Clause
// How a ScoreBlock reads its part of a tile of a bias or mask that TMA brought: always a box
// [query][key], whatever the rows of the scores are.
#pragma once

#include "cuda/common/score_block.cuh"
#include "cuda/sm90/pair_tiles.h"
#include "cuda/sm90/traits.cuh"
#include "primitives/ptx/ldmatrix.cuh"

namespace flash::cuda::sm90 {

/// f(address of the tile of pairs, if there is one), which is then free for another block.
template <class Storage, int kStages, class F>
FLASH_DEVICE void with_pair_tile(const PairTiles& pairs, Storage& storage, Ring<kStages>& ring,
                                 F&& f) {
  const bool is_staged = pairs.kind != PairKind::kNone;
  if (is_staged) ptx::mbarrier_wait(&storage.full[ring.stage], ring.parity);
  f(shared_address(storage.tile[ring.stage]));
  if (!is_staged) return;
  release(&storage.empty[ring.stage]);
  ring.advance();
}

/// `row` and `column` count from the corner of a tile of kBlockM queries x kBlockN keys.
///   kQueries  this thread's first row; the block's first column
///   kKeys     the warp's first row; the block's first column: the tile is read transposed
template <int kBlockM, int kBlockN, BlockRows kRows>
struct StagedPairs {
  PairKind kind;
  uint32_t tile;
  int row, column;

  FLASH_DEVICE bool has_bias() const { return kind == PairKind::kBias; }
  FLASH_DEVICE bool has_mask() const { return kind == PairKind::kMask; }

  template <class Element>
  FLASH_DEVICE ScoreBlock bias() const {
    uint32_t pairs[ScoreBlock::kCount / 2];  // of columns
    load_matrices<Element>(pairs);
    return ScoreBlock::of([&](int i) {
      const float2 pair = unpack<Element>(pairs[i / 2]);
      return i % 2 ? pair.y : pair.x;
    });
  }
  FLASH_DEVICE uint32_t kept() const {
    return kRows == BlockRows::kQueries ? kept_in_rows() : kept_in_columns();
  }

 private:
  template <class T>
  using Layout = PairTileLayout<T, kBlockM, kBlockN>;

  /// f(i, address) for the pairs of columns 2 i, 2 i + 1 of a ScoreBlock.
  template <class T, class F>
  FLASH_DEVICE void for_each_pair(F&& f) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t line = Layout<T>::swizzled(row + 8 * r, 2 * (threadIdx.x % 4));
#pragma unroll
      for (int j = 0; j < ScoreBlock::kCount / 4; ++j)
        f(2 * j + r, tile + Layout<T>::moved(line, column + 8 * j));
    }
  }
  /// Address of 16 bytes of the line of a query.
  template <class T>
  FLASH_DEVICE uint32_t line(int query, int key) const {
    return tile + Layout<T>::moved(Layout<T>::swizzled(query, 0), key);
  }
  /// Matrices of 8 x 8 elements, transposed on their way if rows are keys: an accumulator's layout
  /// as it is.
  template <class T>
  FLASH_DEVICE void load_matrices(uint32_t (&pairs)[ScoreBlock::kCount / 2]) const {
    const int lane = threadIdx.x % 32, low = lane % 8, half = lane / 8 % 2 * 8;
#pragma unroll
    for (int j = 0; j < ScoreBlock::kCount / 4; j += 2) {  // 2 x 8 rows of 2 x 8 columns
      auto& matrices = reinterpret_cast<uint32_t (&)[4]>(pairs[2 * j]);
      const int first = column + 8 * j + lane / 16 * 8;
      if constexpr (kRows == BlockRows::kQueries) {
        ldmatrix_x4(matrices, line<T>(row - lane / 4 + low + half, first));
      } else {
        ldmatrix_x4_trans(matrices, line<T>(first + low, row + half));
      }
    }
  }

  /// Bit 7 of every byte that is not 0.
  static FLASH_DEVICE uint32_t nonzero_bytes(uint32_t bytes) {
    return (((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes) & 0x80808080u;
  }
  FLASH_DEVICE uint32_t kept_in_rows() const {
    uint32_t pairs[ScoreBlock::kCount / 2], bits = 0;
    for_each_pair<uint8_t>([&](int i, uint32_t place) { pairs[i] = load_shared<uint16_t>(place); });
#pragma unroll
    for (int j = 0; j < ScoreBlock::kCount / 4; ++j)  // bytes by 2 c + r
      bits |= nonzero_bytes(__byte_perm(pairs[2 * j], pairs[2 * j + 1], 0x5140)) >> j;
    return bits;
  }
  /// Transposed in pairs of bytes: of 8 queries x 16 keys, byte 2 c + key % 2 of keys 2 g and
  /// 2 g + 1, g = lane / 4. The lane wants g and g + 8: two shuffles bring their bits.
  FLASH_DEVICE uint32_t kept_in_columns() const {
    const int lane = threadIdx.x % 32;
    uint32_t matrices[4], bits = 0, kept = 0;
    ldmatrix_x4_trans(matrices, line<uint8_t>(column + lane, row));
#pragma unroll
    for (int j = 0; j < 4; ++j) bits |= nonzero_bytes(matrices[j]) >> j;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int source = (r * 4 + lane / 8) * 4 + lane % 4;
      const uint32_t own = __shfl_sync(0xffffffffu, bits, source) >> lane / 4 % 2 * 8;
      kept |= (own & 0x00ff00ffu) << 8 * r;
    }
    return kept;
  }
};

}  // namespace flash::cuda::sm90
