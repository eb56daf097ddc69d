// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/simt/forward.cuh"

namespace flash::cuda::simt {

template void launch_forward<DType::kFloat64, 64, Variant::kGeneral>(const ForwardParams&, void*);

}  // namespace flash::cuda::simt
