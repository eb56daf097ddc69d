// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/simt/backward_kv.cuh"

namespace flash::cuda::simt {

template void launch_backward<DType::kBFloat16, 128, Variant::kGeneral>(const BackwardParams&,
                                                                        const RowView&, void*);

}  // namespace flash::cuda::simt
