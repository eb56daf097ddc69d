// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm90/backward_wide_launch.cuh"

namespace flash::cuda::sm90 {

template <>
void launch_backward<192>(const BackwardParams& p, void* workspace, void* stream) {
  if (p.head_dim_v <= 128) return launch_wide<WideTileD192V128>(p, workspace, stream);
  launch_wide<WideTileD192>(p, workspace, stream);
}

}  // namespace flash::cuda::sm90
