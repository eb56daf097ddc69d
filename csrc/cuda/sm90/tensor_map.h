// SPDX-License-Identifier: BSD-3-Clause
// TMA descriptors of attention tensors, made without linking libcuda. Host only.
#pragma once

#include <cuda.h>

#include <string>

#include "attention/params.h"
#include "cuda/sm90/pair_tiles.h"
#include "cuda/sm90/tma_tensor.h"

namespace flash::cuda::sm90 {

/// Sizes of a tensor (batch, heads, rows, columns); packed: batch 1.
struct TensorShape {
  int batch, heads;
  int64_t rows;
  int columns;
};

/// "" if TMA can describe the tensor (or there is none); else what it needs, after the tensor's
/// name.
std::string why_no_tensor_map(const char* name, const TensorView& tensor, const TensorShape& shape);

/// Boxes of `box_rows` rows of 64 columns in the 128-byte swizzle; what lies outside reads as 0 and
/// is not written. Coordinates (column, row, head, batch).
CUtensorMap make_tensor_map(DType dtype, const TensorView& tensor, const TensorShape& shape,
                            int box_rows);

/// The same for sequences of their own lengths.
std::string why_no_tma_tensor(const char* name, const TensorView& tensor,
                              const SequenceLayout& layout, const TensorShape& shape);
TmaTensor make_tma_tensor(DType dtype, const TensorView& tensor, const SequenceLayout& layout,
                          const TensorShape& shape, int box_rows);

/// Tiles of rows x cols of the bias or the mask of a call, if TMA can bring them.
PairTiles make_pair_tiles(const ForwardParams& p, int rows, int cols);

}  // namespace flash::cuda::sm90
