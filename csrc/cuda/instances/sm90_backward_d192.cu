// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm90/backward_separate_launch.cuh"

namespace flash::cuda::sm90 {

template <>
void launch_backward<192, Variant::kPlain>(const BackwardParams& p, void* workspace, void* stream) {
  const BackwardPlan plan = make_backward_plan(p);
  if (p.head_dim_v <= 128) return launch_separate<SeparateTileD192V128>(p, plan, workspace, stream);
  launch_separate<SeparateTileD192>(p, plan, workspace, stream);
}

template <>
void launch_backward<192, Variant::kGeneral>(const BackwardParams& p, void* workspace,
                                             void* stream) {
  const BackwardPlan plan = make_backward_plan(p);
  if (p.head_dim_v <= 128)
    return launch_separate<SeparateTileD192V128General, Variant::kGeneral>(p, plan, workspace,
                                                                           stream);
  launch_separate<SeparateTileD192General, Variant::kGeneral>(p, plan, workspace, stream);
}

}  // namespace flash::cuda::sm90
