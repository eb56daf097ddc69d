// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "cuda/sm90/backward_launch.cuh"
#include "cuda/sm90/backward_wide_keys.cuh"
#include "cuda/sm90/backward_wide_queries.cuh"

namespace flash::cuda::sm90 {

/// Gradients that are not wanted are not computed.
template <class Element, class Tile>
void launch_wide_element(const BackwardParams& p, void* workspace, void* stream) {
  using Keys = WideKeysTraits<Element, Tile>;
  using Queries = WideQueriesTraits<Element, Tile>;
  const BackwardPlan plan = make_backward_plan(p);
  BackwardSchedule schedule = make_backward_schedule(plan, /*deterministic=*/false, workspace);
  const int heads = p.batch * p.num_heads;
  launch(prepare_kernel<Keys>, int64_t{heads} * plan.num_m_blocks, 256, 0, stream, p, schedule);
  if (p.dk.data || p.dv.data)
    launch(keys_kernel<Keys>, std::min(plan.num_tiles, num_multiprocessors()), Keys::kThreads,
           sizeof(typename Keys::SharedStorage), stream, make_backward_maps<Keys>(p), p, schedule);
  if (!p.dq.data) return;
  schedule.num_m_blocks = plan.num_m_blocks * Keys::kBlockM / Queries::kBlockM;
  schedule.num_tiles = heads * schedule.num_m_blocks;
  launch(queries_kernel<Queries>, std::min(schedule.num_tiles, num_multiprocessors()),
         Queries::kThreads, sizeof(typename Queries::SharedStorage), stream,
         make_backward_maps<Queries>(p), p, schedule);
}

template <class Tile>
void launch_wide(const BackwardParams& p, void* workspace, void* stream) {
  if (p.dtype == DType::kBFloat16) {
    launch_wide_element<__nv_bfloat16, Tile>(p, workspace, stream);
  } else {
    launch_wide_element<__half, Tile>(p, workspace, stream);
  }
}

}  // namespace flash::cuda::sm90
