// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm90/backward_wide_launch.cuh"

namespace flash::cuda::sm90 {

template <>
void launch_backward<256>(const BackwardParams& p, void* workspace, void* stream) {
  launch_wide<WideTileD256>(p, workspace, stream);
}

}  // namespace flash::cuda::sm90
