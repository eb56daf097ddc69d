// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/common/backward_bias.cuh"
#include "cuda/common/backward_delta.cuh"
#include "cuda/common/backward_heads.cuh"
#include "cuda/common/fill_rows.cuh"

namespace flash::cuda {

template void launch_fill_rows<DType::kFloat64>(const TensorView&, const RowView&,
                                                const SequenceLayout&, int, int, int, Fill, void*);
template void launch_backward_delta<DType::kFloat64>(const BackwardParams&, const RowView&, void*);
template void launch_backward_bias<DType::kFloat64>(const BackwardParams&, const RowView&, void*);
template void launch_backward_slopes<DType::kFloat64>(const BackwardParams&, const RowView&, void*,
                                                      void*);
template void launch_backward_sink<DType::kFloat64>(const BackwardParams&, const RowView&, void*);

}  // namespace flash::cuda
