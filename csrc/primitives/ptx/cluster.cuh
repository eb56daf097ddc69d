// SPDX-License-Identifier: BSD-3-Clause
// CTAs of a cluster, which run at the same time and can read each other's shared memory.
#pragma once

#include "primitives/device.cuh"

namespace flash::ptx {

/// 0 and 1 in a launch without clusters.
FLASH_DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
FLASH_DEVICE int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

/// Barrier of all threads of the cluster that have not ended; what they wrote is visible behind it.
FLASH_DEVICE void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}

/// What lies at this CTA's address `shared` in the shared memory of another.
FLASH_DEVICE float4 load_cluster_v4(uint32_t shared, int rank) {
  float4 v;
  asm volatile(
      "{ .reg .b32 at; mapa.shared::cluster.u32 at, %4, %5; "
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [at]; }"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(shared), "r"(rank)
      : "memory");
  return v;
}

}  // namespace flash::ptx
