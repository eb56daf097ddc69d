// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm90/forward_launch.cuh"

namespace flash::cuda::sm90 {

template <>
void launch_forward<192, Variant::kPlain>(const ForwardParams& p, void* workspace, void* stream) {
  if (p.head_dim_v <= 128) return launch_forward_tile<192, TileD192Values128>(p, workspace, stream);
  launch_forward_tile<192, TileD192>(p, workspace, stream);
}

template <>
void launch_forward<192, Variant::kGeneral>(const ForwardParams& p, void* workspace, void* stream) {
  launch_forward_general<192, TileD192General>(p, workspace, stream);
}

}  // namespace flash::cuda::sm90
