// SPDX-License-Identifier: BSD-3-Clause
// Rows that no sequence owns (between packed sequences, beyond seqused) are results too: 0, and
// -inf in lse.
#pragma once

#include <algorithm>

#include "cuda/common/pair_score.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace flash::cuda {

inline constexpr int kFillThreads = 256;

/// Range number `index` of the rows to fill, as a Sequence that owns them.
///   packed  before sequence `index`, from the end of the one before; the last range, number
///           `batch`, lies behind all of them
///   dense   behind the used rows of sequence `index`
__device__ __forceinline__ Sequence rows_to_fill(const SequenceLayout& layout, int batch, int index,
                                                 Fill fill) {
  if (layout.packed()) {
    if (fill == Fill::kAll) return {0, 0, index == 0 ? int(layout.total) : 0};
    int64_t begin = 0, end = layout.total;
    if (index > 0) {
      const Sequence before = Sequence::of(layout, index - 1);
      begin = before.first_row + before.length;
    }
    if (index < batch) end = Sequence::of(layout, index).first_row;
    return {begin, 0, end > begin ? int(end - begin) : 0};
  }
  if (index == batch) return {0, 0, 0};
  const int used = fill == Fill::kAll ? 0 : Sequence::of(layout, index).length;
  return {used, index, layout.max - used};
}

/// CTA (range, part) fills every `parts`th bundle of rows of its range, one warp a row and head.
template <class Element>
__global__ void __launch_bounds__(kFillThreads)
    fill_rows_kernel(const TensorView view, const RowView lse, const SequenceLayout layout,
                     int num_heads, int batch, int width, Fill fill, int parts) {
  using Real = Accumulator<Element>;
  const Sequence rows = rows_to_fill(layout, batch, int(blockIdx.x) / parts, fill);
  const int64_t total = int64_t(rows.length) * num_heads;
  const int64_t step = int64_t(parts) * (kFillThreads / 32);
  const int warp = int(blockIdx.x) % parts * (kFillThreads / 32) + int(threadIdx.x) / 32;
  for (int64_t index = warp; index < total; index += step) {
    const int head = int(index / rows.length);
    const int64_t row = index % rows.length;
    Element* at =
        static_cast<Element*>(view.data) + view.offset(rows, head) + row * view.row_stride;
    for (int d = int(threadIdx.x) % 32; d < width; d += 32) at[d] = narrow<Element>(Real(0));
    if (lse.data && threadIdx.x % 32 == 0)
      static_cast<Real*>(lse.data)[lse.offset(rows, head) + row] = Real(-INFINITY);
  }
}

/// lse may have null data.
template <DType kDType>
void launch_fill_rows(const TensorView& view, const RowView& lse, const SequenceLayout& layout,
                      int num_heads, int batch, int width, Fill fill, void* stream) {
  const int ranges = batch + 1;
  // Enough CTAs for one long range, few where there are many ranges, most of them empty.
  const int parts = fill == Fill::kAll ? 256 : std::clamp(1024 / ranges, 1, 64);
  launch(fill_rows_kernel<Element<kDType>>, int64_t(ranges) * parts, kFillThreads, 0, stream, view,
         lse, layout, num_heads, batch, width, fill, parts);
}

}  // namespace flash::cuda
