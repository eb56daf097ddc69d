// SPDX-License-Identifier: BSD-3-Clause
// How a ScoreBlock reads its part of a tile of a bias or mask that TMA brought: always a box
// [query][key], whatever the rows of the scores are.
#pragma once

#include "cuda/common/score_block.cuh"
#include "cuda/sm90/pair_tiles.h"
#include "primitives/ptx/ldmatrix.cuh"

namespace flash::cuda::sm90 {

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

  template <class T>
  FLASH_DEVICE void load(BlockValues<T>& values) const {
    if constexpr (sizeof(T) <= 2) {  // tiles of wider elements would not fit
      if constexpr (kRows == BlockRows::kQueries) {
        load_rows(values);
      } else if constexpr (sizeof(T) == 2) {
        load_columns(values);
      } else {
        load_columns_of_bytes(values);
      }
    }
  }

 private:
  template <class T>
  using Layout = PairTileLayout<T, kBlockM, kBlockN>;

  template <class T>
  FLASH_DEVICE void load_rows(BlockValues<T>& values) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t line = Layout<T>::swizzled(row + 8 * r, 2 * (threadIdx.x % 4));
#pragma unroll
      for (int j = 0; j < ScoreBlock::kCount / 4; ++j)
        values[2 * j + r] =
            load_shared<AlignedArray<T, 2>>(tile + Layout<T>::moved(line, column + 8 * j));
    }
  }

  /// Address of 16 bytes of the line of a query.
  template <class T>
  FLASH_DEVICE uint32_t line(int query, int key) const {
    return tile + Layout<T>::moved(Layout<T>::swizzled(query, 0), key);
  }
  /// Matrices of 8 x 8 elements, transposed on their way: an accumulator's layout as it is.
  template <class T>
  FLASH_DEVICE void load_columns(BlockValues<T>& values) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < ScoreBlock::kCount / 4; j += 2) {
      uint32_t matrices[4];  // 2 x 8 queries of 2 x 8 keys
      ldmatrix_x4_trans(matrices,
                        line<T>(column + 8 * j + lane / 16 * 8 + lane % 8, row + lane / 8 % 2 * 8));
#pragma unroll
      for (int i = 0; i < 4; ++i)
        values[2 * j + i] = reinterpret_cast<const AlignedArray<T, 2>&>(matrices[i]);
    }
  }
  /// The same in pairs of bytes: 8 queries x 16 keys a matrix, of which a lane gets keys 2 g and
  /// 2 g + 1, g = lane / 4. It wants g and g + 8, and of a mask one bit: byte 2 c + key % 2
  /// collects "is not 0" of all four matrices in bits 7 ... 4, and two shuffles bring them.
  template <class T>
  FLASH_DEVICE void load_columns_of_bytes(BlockValues<T>& values) const {
    const int lane = threadIdx.x % 32;
    uint32_t matrices[4], bits = 0;
    ldmatrix_x4_trans(matrices, line<T>(column + lane, row));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t carries = (matrices[j] & 0x7f7f7f7fu) + 0x7f7f7f7fu;  // bit 7: not 0 or 128
      bits |= ((carries | matrices[j]) & 0x80808080u) >> j;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int source = (r * 4 + lane / 8) * 4 + lane % 4;
      const uint32_t own = __shfl_sync(0xffffffffu, bits, source) >> lane / 4 % 2 * 8;
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) values[2 * j + r].x[c] = T(own >> (16 * c + 7 - j) & 1);
    }
  }
};

}  // namespace flash::cuda::sm90
