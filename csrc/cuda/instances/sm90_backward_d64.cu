// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm90/backward_launch.cuh"

namespace flash::cuda::sm90 {

template <>
void launch_backward<64, Variant::kPlain>(const BackwardParams& p, void* workspace, void* stream) {
  launch_backward_tile<64, BackwardTileD64>(p, make_backward_plan(p), workspace, stream);
}

template <>
void launch_backward<64, Variant::kGeneral>(const BackwardParams& p, void* workspace,
                                            void* stream) {
  launch_backward_tile<64, BackwardTileD64General, Variant::kGeneral>(p, make_backward_plan(p),
                                                                      workspace, stream);
}

}  // namespace flash::cuda::sm90
