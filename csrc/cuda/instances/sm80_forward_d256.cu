// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm80/forward.cuh"

namespace flash::cuda::sm80 {

template void launch_forward<DType::kFloat16, 256, Variant::kPlain>(const ForwardParams&, void*);
template void launch_forward<DType::kFloat16, 256, Variant::kGeneral>(const ForwardParams&, void*);
template void launch_forward<DType::kBFloat16, 256, Variant::kPlain>(const ForwardParams&, void*);
template void launch_forward<DType::kBFloat16, 256, Variant::kGeneral>(const ForwardParams&, void*);

}  // namespace flash::cuda::sm80
