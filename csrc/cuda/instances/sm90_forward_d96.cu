// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm90/forward_launch.cuh"

namespace flash::cuda::sm90 {

template <>
void launch_forward<96, Variant::kPlain>(const ForwardParams& p, void* workspace, void* stream) {
  if (p.k_layout.max > 1024) return launch_forward_tile<96, TileD96Long>(p, workspace, stream);
  launch_forward_tile<96, TileD96Short>(p, workspace, stream);
}

template <>
void launch_forward<96, Variant::kGeneral>(const ForwardParams& p, void* workspace, void* stream) {
  launch_forward_general<96, TileD96General>(p, workspace, stream);
}

}  // namespace flash::cuda::sm90
