// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/sm90/backward.cuh"
#include "cuda/sm90/backward_plan.h"
#include "cuda/sm90/backward_prepare.cuh"
#include "cuda/sm90/support.h"
#include "cuda/sm90/tensor_map.h"

namespace flash::cuda::sm90 {

inline BackwardSchedule make_backward_schedule(const BackwardParams& p, const BackwardPlan& plan,
                                               void* workspace) {
  const auto at = [&](int64_t bytes) { return static_cast<void*>((char*)workspace + bytes); };
  BackwardSchedule schedule{};
  schedule.num_m_blocks = Divisor(plan.num_m_blocks);
  schedule.heads = Divisor(p.num_heads);
  schedule.heads_k = Divisor(p.num_heads_k);
  schedule.order = TileOrder(p.batch * p.num_heads_k, plan.num_n_blocks, plan.section_heads,
                             plan.last_section_heads);
  schedule.dq_slots = Divisor(std::max(plan.dq_slots, 1));  // none where nothing is summed
  schedule.num_n_blocks = plan.num_n_blocks;
  schedule.num_tiles = plan.num_tiles;
  schedule.ordered = p.deterministic;
  schedule.last_first = plan.last_first;
  schedule.prepares_inside = plan.prepares_inside;
  schedule.lse_log2 = static_cast<float*>(workspace);
  schedule.delta = static_cast<float*>(at(plan.delta_at));
  schedule.dq_sums = static_cast<float*>(at(plan.dq_sums_at));
  schedule.drawn = static_cast<DrawnWork*>(at(plan.counters_at));
  schedule.arrivals = reinterpret_cast<int*>(schedule.drawn + 1);
  schedule.opened = schedule.arrivals + int64_t{plan.dq_slots} * plan.num_m_blocks;
  return schedule;
}

template <class Traits>
BackwardMaps make_backward_maps(const BackwardParams& p) {
  BackwardMaps maps{
      make_tma_tensor(p, p.q, p.q_layout, p.num_heads, p.head_dim, Traits::kBlockM),
      make_tma_tensor(p, p.k, p.k_layout, p.num_heads_k, p.head_dim, Traits::kBlockN),
      make_tma_tensor(p, p.v, p.k_layout, p.num_heads_k, p.head_dim_v, Traits::kBlockN),
      make_tma_tensor(p, p.dout, p.q_layout, p.num_heads, p.head_dim_v, Traits::kBlockM)};
  if constexpr (Traits::kGeneral) {
    maps.pairs = make_pair_tiles(p, Traits::kBlockM, Traits::kBlockN);
    maps.has_dbias = writes_bias_gradient(p);
    if (maps.has_dbias) maps.dbias = make_bias_gradient_map(p, Traits::kBlockM, 64);
  }
  return maps;
}

template <class Traits>
void launch_backward_traits(const BackwardParams& p, const BackwardPlan& plan, void* workspace,
                            void* stream) {
  const BackwardSchedule schedule = make_backward_schedule(p, plan, workspace);
  BackwardMaps maps = make_backward_maps<Traits>(p);
  if constexpr (Traits::kStoresFromDs) {
    if (p.dk.data) maps.dk = make_tma_tensor(p, p.dk, p.k_layout, p.num_heads_k, p.head_dim, 64);
    if (p.dv.data) maps.dv = make_tma_tensor(p, p.dv, p.k_layout, p.num_heads_k, p.head_dim_v, 64);
  }
  if (plan.prepares_inside) {
    constexpr int kRows = Traits::kBlockM / 2;
    maps.half_out = make_tma_tensor(p, p.out, p.q_layout, p.num_heads, p.head_dim_v, kRows);
    maps.half_dout = make_tma_tensor(p, p.dout, p.q_layout, p.num_heads, p.head_dim_v, kRows);
    FLASH_CUDA_CHECK(cudaMemsetAsync(schedule.drawn, 0, plan.bytes - plan.counters_at,
                                     static_cast<cudaStream_t>(stream)));
  } else {
    const int64_t query_blocks = int64_t{p.batch} * p.num_heads * plan.num_m_blocks;
    launch(prepare_kernel<Traits>, query_blocks, 256, 0, stream, p, schedule);
  }
  if (!p.dq.data && !p.dk.data && !p.dv.data && !maps.has_dbias) return;  // dbias, by others
  const int ctas = std::min(plan.num_tiles, num_multiprocessors());
  constexpr size_t kSharedBytes = sizeof(typename Traits::SharedStorage);
  if (plan.prepares_inside) {
    launch(backward_kernel<Traits>, ctas, Traits::kThreads, kSharedBytes, stream, maps, p,
           schedule);
  } else {  // its CTAs start as those of prepare_kernel end
    launch_early(backward_kernel<Traits>, ctas, Traits::kThreads, kSharedBytes, stream, maps, p,
                 schedule);
  }
}

/// Element of the call; the row of the tile table is the plan's.
template <int kHeadDim, class Tile, Variant kVariant = Variant::kPlain>
void launch_backward_tile(const BackwardParams& p, const BackwardPlan& plan, void* workspace,
                          void* stream) {
  if (p.dtype == DType::kBFloat16) {
    launch_backward_traits<BackwardTraits<__nv_bfloat16, kHeadDim, Tile, kVariant>>(
        p, plan, workspace, stream);
  } else {
    launch_backward_traits<BackwardTraits<__half, kHeadDim, Tile, kVariant>>(p, plan, workspace,
                                                                             stream);
  }
}

}  // namespace flash::cuda::sm90
