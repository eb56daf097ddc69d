// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm80/backward.cuh"

namespace flash::cuda::sm80 {

template void launch_backward<DType::kFloat16, 96, Variant::kPlain>(const BackwardParams&,
                                                                    const RowView&, void*, void*);
template void launch_backward<DType::kFloat16, 96, Variant::kGeneral>(const BackwardParams&,
                                                                      const RowView&, void*, void*);
template void launch_backward<DType::kBFloat16, 96, Variant::kPlain>(const BackwardParams&,
                                                                     const RowView&, void*, void*);
template void launch_backward<DType::kBFloat16, 96, Variant::kGeneral>(const BackwardParams&,
                                                                       const RowView&, void*,
                                                                       void*);

}  // namespace flash::cuda::sm80
