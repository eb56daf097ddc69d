// SPDX-License-Identifier: BSD-3-Clause
// mbarriers: arrivals and bytes counted in shared memory (PTX ISA, "mbarrier").
#pragma once

#include "primitives/device.cuh"

namespace flash::ptx {

FLASH_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals));
}

/// Arrivals of a warp: one, after __syncwarp(). racecheck does not see that this puts what the
/// other lanes did before the arrival of the first; in a build for it all of them arrive.
#ifdef FLASH_SANITIZE
constexpr int kArrivalsOfWarp = 32;
#else
constexpr int kArrivalsOfWarp = 1;
#endif

/// For so many `warps` that call mbarrier_release, and `threads` that arrive by themselves.
FLASH_DEVICE void mbarrier_init_for_warps(uint64_t* barrier, int warps, int threads = 0) {
  mbarrier_init(barrier, warps * kArrivalsOfWarp + threads);
}

/// Makes initialised barriers visible to the TMA unit; follow with a CTA barrier.
FLASH_DEVICE void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// One arrival, and `bytes` more that the copies to come will count down.
FLASH_DEVICE void mbarrier_expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

FLASH_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

/// All lanes of a warp, when each is done with what the barrier guards.
FLASH_DEVICE void mbarrier_release(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 < kArrivalsOfWarp) mbarrier_arrive(barrier);
}

/// Returns when the phase with this parity is complete. Full barriers start with parity 0, empty
/// ones with 1.
FLASH_DEVICE void mbarrier_wait(uint64_t* barrier, int parity) {
  uint32_t complete = 0;
  while (!complete) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
        "selp.b32 %0, 1, 0, p; }"
        : "=r"(complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

}  // namespace flash::ptx
