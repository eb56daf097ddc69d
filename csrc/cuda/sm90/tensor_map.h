// SPDX-License-Identifier: BSD-3-Clause
// TMA descriptors of attention tensors, made without linking libcuda. Host only.
#pragma once

#include <cuda.h>

#include <string>

#include "attention/params.h"

namespace flash::cuda::sm90 {

/// Sizes of a dense tensor (batch, heads, rows, columns).
struct TensorShape {
  int batch, heads, rows, columns;
};

/// "" if TMA can describe the tensor (or there is none); else what it needs, after the tensor's
/// name.
std::string why_no_tensor_map(const char* name, const TensorView& tensor, const TensorShape& shape);

/// Boxes of `box_rows` rows of 64 columns in the 128-byte swizzle; what lies outside reads as 0 and
/// is not written. Coordinates (column, row, head, batch).
CUtensorMap make_tensor_map(DType dtype, const TensorView& tensor, const TensorShape& shape,
                            int box_rows);

}  // namespace flash::cuda::sm90
