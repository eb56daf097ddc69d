// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm90/backward_launch.cuh"

namespace flash::cuda::sm90 {

template <>
void launch_backward<96>(const BackwardParams& p, void* workspace, void* stream) {
  launch_backward_tile<96, BackwardTileD128>(p, make_backward_plan(p), workspace, stream);
}

}  // namespace flash::cuda::sm90
