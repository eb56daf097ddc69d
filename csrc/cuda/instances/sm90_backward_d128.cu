// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm90/backward_launch.cuh"
#include "cuda/sm90/backward_separate_launch.cuh"

namespace flash::cuda::sm90 {

template <>
void launch_backward<128, Variant::kPlain>(const BackwardParams& p, void* workspace, void* stream) {
  const BackwardPlan plan = make_backward_plan(p);
  if (plan.is_separate) return launch_separate<SeparateTileD128>(p, plan, workspace, stream);
  launch_backward_tile<128, BackwardTileD128>(p, plan, workspace, stream);
}

template <>
void launch_backward<128, Variant::kGeneral>(const BackwardParams& p, void* workspace,
                                             void* stream) {
  launch_backward_tile<128, BackwardTileD128General, Variant::kGeneral>(p, make_backward_plan(p),
                                                                        workspace, stream);
}

}  // namespace flash::cuda::sm90
