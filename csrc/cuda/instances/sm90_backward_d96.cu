// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm90/backward_launch.cuh"
#include "cuda/sm90/backward_separate_launch.cuh"

namespace flash::cuda::sm90 {

template <>
void launch_backward<96, Variant::kPlain>(const BackwardParams& p, void* workspace, void* stream) {
  const BackwardPlan plan = make_backward_plan(p);
  if (plan.is_separate) return launch_separate<SeparateTileD96>(p, plan, workspace, stream);
  launch_backward_tile<96, BackwardTileD96>(p, plan, workspace, stream);
}

template <>
void launch_backward<96, Variant::kGeneral>(const BackwardParams& p, void* workspace,
                                            void* stream) {
  launch_backward_tile<96, BackwardTileD96General, Variant::kGeneral>(p, make_backward_plan(p),
                                                                      workspace, stream);
}

}  // namespace flash::cuda::sm90
