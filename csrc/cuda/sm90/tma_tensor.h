// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cuda.h>

#include "attention/seqlen.h"

namespace flash::cuda::sm90 {

/// Two of the five coordinates (column, head, row, slice, wrap) by which TMA finds a row.
struct TmaRow {
  int row, slice;
};

/// A tensor of sequences for TMA, whose bounds are those of one sequence: rows behind its last one
/// are read as 0 and never written, also where the next sequence lies there.
///
///   dense    slice = batch entry, wrap = 0; every sequence has all the rows
///   ragged   row r of a sequence of `length` rows that begins `first` rows after the tensor:
///              row   = 2^30 - length + r    of 2^30: out of bounds from r = length on
///              slice = first + length       as far apart as rows are
///              wrap  = 2^30                 2^34 elements - 1 row apart: 2^30 of them are 2^64
///                                           16-bit elements, which addresses do not see, - 2^30
///                                           rows
///            the sum of the three is first + r rows
///
/// A box may span heads: its rows are the first rows of 2^log2_heads heads, then their second ones.
struct TmaTensor {
  static constexpr int kRaggedRows = 1 << 30;
  static constexpr int64_t kWrap = int64_t{1} << 34;

  CUtensorMap map;
  int wrap;        ///< 0: dense
  int slice_rows;  ///< ragged: rows from one batch entry to the next
  int log2_heads;  ///< of a box

  FLASH_HOST_DEVICE TmaRow first_row(const Sequence& s) const {
    if (wrap == 0) return {0, s.batch_index};
    return {kRaggedRows - s.length, int(s.first_row) + s.batch_index * slice_rows + s.length};
  }
};

}  // namespace flash::cuda::sm90
