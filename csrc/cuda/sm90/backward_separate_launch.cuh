// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "cuda/sm90/backward_launch.cuh"
#include "cuda/sm90/backward_separate_keys.cuh"
#include "cuda/sm90/backward_separate_queries.cuh"

namespace flash::cuda::sm90 {

/// Gradients that are not wanted are not computed. The CTAs of queries_kernel start as those of
/// keys_kernel end: it needs nothing of them.
template <class Element, class Tile, Variant kVariant>
void launch_separate_element(const BackwardParams& p, const BackwardPlan& plan, void* workspace,
                             void* stream) {
  using Keys = KeysTraits<Element, Tile, kVariant>;
  using Queries = QueriesTraits<Element, Tile, kVariant>;
  BackwardSchedule schedule = make_backward_schedule(p, plan, workspace);
  const int heads = p.batch * p.num_heads;
  schedule.num_m_blocks = Divisor(plan.num_m_blocks * (Queries::kBlockM / Keys::kBlockM));
  launch(prepare_kernel<Keys>, int64_t{heads} * schedule.num_m_blocks.value(), 256, 0, stream, p,
         schedule);
  const int sms = num_multiprocessors();
  const bool wants_keys = plan.num_tiles > 0 && (p.dk.data || p.dv.data);
  if (wants_keys)
    launch_early(keys_kernel<Keys>, std::min(plan.num_tiles, sms), Keys::kThreads,
                 sizeof(typename Keys::SharedStorage), stream, make_backward_maps<Keys>(p), p,
                 schedule);
  if (!p.dq.data && !(Queries::kGeneral && writes_bias_gradient(p))) return;
  schedule.num_m_blocks = Divisor(plan.num_m_blocks);
  schedule.num_tiles = heads * plan.num_m_blocks;
  schedule.order = TileOrder(heads, plan.num_m_blocks, 1, plan.last_query_heads);
  const BackwardMaps maps = make_backward_maps<Queries>(p);
  const int ctas = std::min(schedule.num_tiles, sms);
  constexpr size_t kSharedBytes = sizeof(typename Queries::SharedStorage);
  if (wants_keys) {
    launch_early(queries_kernel<Queries>, ctas, Queries::kThreads, kSharedBytes, stream, maps, p,
                 schedule);
  } else {
    launch(queries_kernel<Queries>, ctas, Queries::kThreads, kSharedBytes, stream, maps, p,
           schedule);
  }
}

template <class Tile, Variant kVariant = Variant::kPlain>
void launch_separate(const BackwardParams& p, const BackwardPlan& plan, void* workspace,
                     void* stream) {
  if (p.dtype == DType::kBFloat16) {
    launch_separate_element<__nv_bfloat16, Tile, kVariant>(p, plan, workspace, stream);
  } else {
    launch_separate_element<__half, Tile, kVariant>(p, plan, workspace, stream);
  }
}

}  // namespace flash::cuda::sm90
