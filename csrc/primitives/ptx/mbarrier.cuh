// SPDX-License-Identifier: BSD-3-Clause
// mbarriers: arrivals and bytes counted in shared memory (PTX ISA, "mbarrier").
#pragma once

#include "primitives/device.cuh"

namespace flash::ptx {

FLASH_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals));
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
