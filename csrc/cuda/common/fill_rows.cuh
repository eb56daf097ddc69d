// SPDX-License-Identifier: BSD-3-Clause
// Rows that no sequence owns (between packed sequences, beyond seqused) are results too: 0, and
// -inf in lse. They are written before the kernels that know only rows of sequences. One warp per
// row.
#pragma once

#include "cuda/common/pair_score.cuh"
#include "cuda/launch.cuh"

namespace flash::cuda {

inline constexpr int kFillWarps = 8;

/// `sets` heads of `rows` rows in each of `batch` tensors; a packed tensor is one.
template <class Element>
__global__ void __launch_bounds__(kFillWarps * 32)
    fill_rows_kernel(const TensorView view, const RowView lse, int64_t rows, int num_heads,
                     int batch, int width) {
  using Real = Accumulator<Element>;
  const int64_t index = int64_t(blockIdx.x) * kFillWarps + threadIdx.x / 32;
  const int64_t row = index % rows, head = index / rows % num_heads;
  const int64_t b = index / rows / num_heads;
  if (b >= batch) return;
  Element* at = static_cast<Element*>(view.data) + b * view.batch_stride + head * view.head_stride +
                row * view.row_stride;
  for (int d = threadIdx.x % 32; d < width; d += 32) at[d] = narrow<Element>(Real(0));
  if (lse.data && threadIdx.x % 32 == 0)
    static_cast<Real*>(lse.data)[b * lse.batch_stride + head * lse.head_stride + row] =
        Real(-INFINITY);
}

/// lse may have null data.
template <DType kDType>
void launch_fill_rows(const TensorView& view, const RowView& lse, const SequenceLayout& layout,
                      int num_heads, int batch, int width, void* stream) {
  const int64_t rows = layout.packed() ? layout.total : layout.max;
  if (layout.packed()) batch = 1;
  launch(fill_rows_kernel<Element<kDType>>, ceil_div(rows * num_heads * batch, kFillWarps),
         kFillWarps * 32, 0, stream, view, lse, rows, num_heads, batch, width);
}

}  // namespace flash::cuda
