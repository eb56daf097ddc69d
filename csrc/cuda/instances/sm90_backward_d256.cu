// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm90/backward_separate_launch.cuh"

namespace flash::cuda::sm90 {

template <>
void launch_backward<256, Variant::kPlain>(const BackwardParams& p, void* workspace, void* stream) {
  const BackwardPlan plan = make_backward_plan(p);
  launch_separate<SeparateTileD256>(p, plan, workspace, stream);
}

template <>
void launch_backward<256, Variant::kGeneral>(const BackwardParams& p, void* workspace,
                                             void* stream) {
  const BackwardPlan plan = make_backward_plan(p);
  launch_separate<SeparateTileD256General, Variant::kGeneral>(p, plan, workspace, stream);
}

}  // namespace flash::cuda::sm90
