// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm90/forward_launch.cuh"

namespace flash::cuda::sm90 {

template <>
void launch_forward<256, Variant::kPlain>(const ForwardParams& p, void* workspace, void* stream) {
  launch_forward_tile<256, TileD256>(p, workspace, stream);
}

template <>
void launch_forward<256, Variant::kGeneral>(const ForwardParams& p, void* workspace, void* stream) {
  launch_forward_general<256, TileD256General>(p, workspace, stream);
}

}  // namespace flash::cuda::sm90
