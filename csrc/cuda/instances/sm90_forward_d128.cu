// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm90/forward_launch.cuh"

namespace flash::cuda::sm90 {

template <>
void launch_forward<128, Variant::kPlain>(const ForwardParams& p, void* workspace, void* stream) {
  launch_forward_tile<128, TileD128>(p, workspace, stream);
}

template <>
void launch_forward<128, Variant::kGeneral>(const ForwardParams& p, void* workspace, void* stream) {
  launch_forward_general<128, TileD128General, TileD128Products>(p, workspace, stream);
}

}  // namespace flash::cuda::sm90
