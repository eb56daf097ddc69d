// SPDX-License-Identifier: BSD-3-Clause
// FlashAttention-2, Algorithm 2, for sm_90a: persistent and warp-specialised.
//
// Grid      min(tiles, SMs) CTAs of three warpgroups, which draw all work; none has to be there. A
//           tile is 128 keys of one key head, against all blocks of kBlockM queries of its query
//           heads that see one of them.
// Roles     warpgroup 0: thread 0 draws tiles and loads (backward_load.cuh), warp 1 adds dQ to
//           the fp32 sums, warps 2 and 3 convert finished sums (backward_dq.cuh);
//           warpgroups 1 and 2: 64 keys each, dK and dV in registers (backward_compute.cuh).
// Shared    K, V once; Q with lse, dO with delta and dS in two stages; dQ on its way out.
// Memory    dQ sums in a ring of heads that stays in L2; counters order additions and conversion.
#pragma once

#include "cuda/sm90/backward_compute.cuh"
#include "cuda/sm90/backward_load.cuh"

namespace flash::cuda::sm90 {

template <class Traits>
FLASH_DEVICE void init_backward_barriers(typename Traits::SharedStorage& shared) {
  constexpr int kMmaWarps = 8;
  ptx::mbarrier_init(&shared.k_full, 1);
  ptx::mbarrier_init_for_warps(&shared.k_empty, kMmaWarps);
  ptx::mbarrier_init(&shared.v_full, 1);
  ptx::mbarrier_init_for_warps(&shared.v_empty, kMmaWarps);
  for (int i = 0; i < 2; ++i) {
    ptx::mbarrier_init(&shared.q_full[i], 1);
    ptx::mbarrier_init_for_warps(&shared.q_empty[i], kMmaWarps);
    ptx::mbarrier_init(&shared.dout_full[i], 1);
    ptx::mbarrier_init_for_warps(&shared.dout_empty[i], kMmaWarps);
    ptx::mbarrier_init(&shared.converted_full[i], 1);
    ptx::mbarrier_init(&shared.tile_full[i], 1);
    ptx::mbarrier_init_for_warps(&shared.tile_empty[i], kMmaWarps + 1);  // and the adding one
  }
  if constexpr (Traits::kGeneral) {
    ptx::mbarrier_init_for_warps(&shared.ds_empty, kMmaWarps);
    for (int i = 0; i < Traits::kPairStages; ++i) {
      ptx::mbarrier_init(&shared.pairs.full[i], 1);
      ptx::mbarrier_init_for_warps(&shared.pairs.empty[i], kMmaWarps);
    }
  }
  ptx::mbarrier_init_fence();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardMaps maps,
                    const __grid_constant__ BackwardParams p,
                    const __grid_constant__ BackwardSchedule schedule) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(raw);
  if (threadIdx.x == 0) init_backward_barriers<Traits>(shared);
  __syncthreads();  // barriers exist before any role touches them

  const int warpgroup = warp_uniform(threadIdx.x >> 7), warp = warp_uniform(threadIdx.x >> 5);
  if (warpgroup == 0) {
    ptx::shrink_registers<Traits::kLoadRegisters>();
    ptx::wait_for_previous_grid();  // prepare_kernel; the other warpgroups wait for what is loaded
    if (threadIdx.x == 0) load_backward_tiles<Traits>(maps, p, schedule, shared);
    if (warp == 1) add_dq<Traits>(p, schedule, shared);
    if (warp >= 2) convert_dq<Traits>(maps, p, schedule, shared, warp - 2);
  } else if (Traits::kIsEven) {  // one copy: two fill the instruction cache, causal 512 +20 %
    ptx::grow_registers<Traits::kFirstRegisters>();
    BackwardCompute<Traits>(maps, p, schedule, shared, warpgroup - 1).run();
  } else if (warpgroup == 1) {
    ptx::grow_registers<Traits::kFirstRegisters>();
    BackwardCompute<Traits>(maps, p, schedule, shared, 0).run();
  } else {
    ptx::grow_registers<Traits::kSecondRegisters>();
    BackwardCompute<Traits>(maps, p, schedule, shared, 1).run();
  }
}

}  // namespace flash::cuda::sm90
