// SPDX-License-Identifier: BSD-3-Clause
// TMA descriptors of attention tensors, made without linking libcuda. Host only.
#pragma once

#include <cuda.h>

#include <string>

#include "attention/params.h"
#include "cuda/sm90/pair_tiles.h"
#include "cuda/sm90/tma_tensor.h"

namespace flash::cuda::sm90 {

/// Why TMA cannot describe a tensor with the rows of `layout`, after the tensor's name; "": it can,
/// or there is none.
std::string why_no_tma_tensor(const char* name, const ForwardParams& p, const TensorView& tensor,
                              const SequenceLayout& layout, int heads, int columns);

/// Boxes of `box_rows` rows, of 2^log2_heads heads together, and 64 columns in the 128-byte
/// swizzle.
TmaTensor make_tma_tensor(const ForwardParams& p, const TensorView& tensor,
                          const SequenceLayout& layout, int heads, int columns, int box_rows,
                          int log2_heads = 0);

/// Which of the bias and the mask of a call TMA can bring in tiles, the bias first.
PairKind pairs_in_tiles(const ForwardParams& p);
/// Tiles of rows x cols of it.
PairTiles make_pair_tiles(const ForwardParams& p, int rows, int cols);

/// Boxes of rows x cols of dbias, where writes_bias_gradient().
CUtensorMap make_bias_gradient_map(const BackwardParams& p, int rows, int cols);

}  // namespace flash::cuda::sm90
