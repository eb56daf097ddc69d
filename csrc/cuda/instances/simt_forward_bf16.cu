// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/simt/forward.cuh"

namespace flash::cuda::simt {

template void launch_forward<DType::kBFloat16, 128, Variant::kGeneral>(const ForwardParams&, void*);

}  // namespace flash::cuda::simt
