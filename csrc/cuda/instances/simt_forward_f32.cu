// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/simt/forward.cuh"

namespace flash::cuda::simt {

template void launch_forward<DType::kFloat32, 64, Variant::kPlain>(const ForwardParams&, void*);
template void launch_forward<DType::kFloat32, 64, Variant::kGeneral>(const ForwardParams&, void*);
template void launch_forward<DType::kFloat32, 128, Variant::kPlain>(const ForwardParams&, void*);
template void launch_forward<DType::kFloat32, 128, Variant::kGeneral>(const ForwardParams&, void*);

}  // namespace flash::cuda::simt
