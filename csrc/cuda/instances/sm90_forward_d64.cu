// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm90/forward_launch.cuh"

namespace flash::cuda::sm90 {

template <>
void launch_forward<64, Variant::kPlain>(const ForwardParams& p, void* workspace, void* stream) {
  if (p.k_layout.max > 4096) return launch_forward_tile<64, TileD64Long>(p, workspace, stream);
  if (is_causal(p)) return launch_forward_tile<64, TileD64ShortCausal>(p, workspace, stream);
  launch_forward_tile<64, TileD64Short>(p, workspace, stream);
}

template <>
void launch_forward<64, Variant::kGeneral>(const ForwardParams& p, void* workspace, void* stream) {
  launch_forward_general<64, TileD64General, TileD64Products>(p, workspace, stream);
}

}  // namespace flash::cuda::sm90
