// SPDX-License-Identifier: BSD-3-Clause
// dbias = dS summed over the dimensions that the bias broadcasts, as a walk: a CTA owns a tile of
// the bias's own shape and visits the blocks of pairs that it sums up, in a fixed order.
#pragma once

#include "attention/mask.h"
#include "attention/params.h"

namespace flash::cuda {

/// Tiles of kRows x kCols of the bias's own shape.
template <int kRows, int kCols>
struct BiasTile {
  int batch, head, row, col;                 ///< own indices; of tiles: row, col
  Range batches, heads, m_blocks, n_blocks;  ///< what it walks

  /// Of the bias's own shape: 1 where it broadcasts.
  template <class Params>
  static FLASH_HOST_DEVICE int rows(const Params& p) {
    return (p.bias_shape[2] + kRows - 1) / kRows;
  }
  template <class Params>
  static FLASH_HOST_DEVICE int cols(const Params& p) {
    return (p.bias_shape[3] + kCols - 1) / kCols;
  }
  template <class Params>
  static FLASH_HOST_DEVICE int64_t count(const Params& p) {
    return int64_t(p.bias_shape[0]) * p.bias_shape[1] * rows(p) * cols(p);
  }

  template <class Params>
  static FLASH_HOST_DEVICE BiasTile of(const Params& p, int64_t index) {
    BiasTile tile;
    tile.col = int(index % cols(p));
    index /= cols(p);
    tile.row = int(index % rows(p));
    index /= rows(p);
    tile.head = int(index % p.bias_shape[1]);
    tile.batch = int(index / p.bias_shape[1]);
    tile.batches = walked(p.bias_shape[0], tile.batch, p.batch);
    tile.heads = walked(p.bias_shape[1], tile.head, p.num_heads);
    tile.m_blocks = walked(p.bias_shape[2], tile.row, (p.q_layout.max + kRows - 1) / kRows);
    tile.n_blocks = walked(p.bias_shape[3], tile.col, (p.k_layout.max + kCols - 1) / kCols);
    return tile;
  }

 private:
  /// The indices of one dimension that a tile walks: all of them where the bias broadcasts.
  static FLASH_HOST_DEVICE Range walked(int bias_size, int own_index, int count) {
    if (bias_size == 1 && count != 1) return {0, count};
    return {own_index, own_index + 1};
  }
};

}  // namespace flash::cuda
