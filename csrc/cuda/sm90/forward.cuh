// SPDX-License-Identifier: BSD-3-Clause
// FlashAttention-2, Algorithm 1, for sm_90a: persistent and warp-specialised.
//
// Grid      min(tiles, SMs) CTAs of 1 + kMmaWarpgroups warpgroups; a tile is
//           kBlockM = 64 kMmaWarpgroups query rows of one (head, batch).
// Roles     warpgroup 0 gives its registers away: thread 0 loads Q, K, V by TMA,
//           thread 32 stores O; general variant: warp 2 cleans K and V, thread 96
//           loads tiles of a bias or mask; the others each own 64 rows: forward_mma.cuh.
// Shared    Q: kQueryStages; blocks of K and V: kStages in one ring or two; in the 128-byte
//           swizzle that TMA writes and wgmma reads. O leaves through its rows of Q.
// Barriers  full[stage]: the bytes of a tile have arrived; empty[stage]: every warp is
//           done with it.
// Overlap   softmax under products of the same and of the other warpgroups; prologue
//           and epilogue of a tile under the products of its neighbours.
#pragma once

#include "cuda/sm90/forward_load.cuh"
#include "cuda/sm90/forward_mma.cuh"

namespace flash::cuda::sm90 {

enum class Role { kLoadAndStore, kMma };

template <class Traits>
FLASH_DEVICE void init_barriers(typename Traits::SharedStorage& shared, bool cleans_keys,
                                bool loads_pairs) {
  constexpr int kMmaWarps = 4 * Traits::kMmaWarpgroups;
  for (int i = 0; i < Traits::kQueryStages; ++i) {
    shared.failed[i] = -1;
    for (auto& rows : shared.marks[i]) rows = {};
    ptx::mbarrier_init(&shared.q_full[i], 1);
    ptx::mbarrier_init_for_warps(&shared.q_empty[i],
                                 (Traits::kStoresThroughQ ? 0 : kMmaWarps) + cleans_keys,
                                 int(Traits::kStoresThroughQ) + loads_pairs);
    for (auto& barrier : shared.o_full[i]) ptx::mbarrier_init_for_warps(&barrier, 4);
  }
  for (int i = 0; i < Traits::kStages; ++i) {
    ptx::mbarrier_init(&shared.kv_full[i], 1);
    ptx::mbarrier_init_for_warps(&shared.kv_empty[i], kMmaWarps);
    ptx::mbarrier_init_for_warps(&shared.kv_clean[i], 1);
  }
  if constexpr (Traits::kGeneral) {
    for (int i = 0; i < Traits::kPairStages; ++i) {
      ptx::mbarrier_init(&shared.pairs.full[i], 1);
      ptx::mbarrier_init_for_warps(&shared.pairs.empty[i], kMmaWarps);
    }
  }
  ptx::mbarrier_init_fence();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardMaps maps,
                   const __grid_constant__ ForwardParams p,
                   const __grid_constant__ ForwardSchedule schedule) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(raw);
  const bool cleans_keys = Traits::kGeneral && has_unattended_keys(p);
  const bool loads_pairs = Traits::kGeneral && maps.pairs.kind != PairKind::kNone;
  if (threadIdx.x == 0) init_barriers<Traits>(shared, cleans_keys, loads_pairs);
  __syncthreads();  // barriers exist before any role touches them

  const int warpgroup = warp_uniform(threadIdx.x >> 7);
  const Role role = warpgroup == 0 ? Role::kLoadAndStore : Role::kMma;
  if (role == Role::kLoadAndStore) {
    ptx::shrink_registers<Traits::kLoadRegisters>();
    if (threadIdx.x == 0) load_tiles<Traits>(maps, p, schedule, shared);
    if (Traits::kStoresThroughQ && threadIdx.x == 32) store_tiles<Traits>(maps, shared);
    if constexpr (Traits::kGeneral) {
      if (threadIdx.x / 32 == 2 && cleans_keys) clean_keys<Traits>(p, shared);
      if (threadIdx.x == 96 && loads_pairs) load_pairs<Traits>(maps.pairs, shared);
    }
  } else {
    ptx::grow_registers<Traits::kMmaRegisters>();
    ForwardMma<Traits>(maps, p, shared, warpgroup - 1).run();
  }
}

}  // namespace flash::cuda::sm90
