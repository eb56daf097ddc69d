// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/simt/backward_kv.cuh"
#include "cuda/simt/weights.cuh"

namespace flash::cuda::simt {

template void launch_weights<DType::kFloat16>(const WeightsParams&, void*);
template void launch_weights_backward<DType::kFloat16>(const WeightsBackwardParams&, void*);

}  // namespace flash::cuda::simt
