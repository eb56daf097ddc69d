// SPDX-License-Identifier: BSD-3-Clause
// Barriers of a part of the CTA, and the register budget of a warpgroup.
#pragma once

#include "primitives/device.cuh"

namespace flash::ptx {

// bar = barrier.aligned. synccheck wants all warps of such a one at the same instruction, also
// those that two copies of the code bring to it; in a build for it barriers are not aligned.
#ifdef FLASH_SANITIZE
#define FLASH_BARRIER "barrier"
#else
#define FLASH_BARRIER "bar"
#endif

FLASH_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile(FLASH_BARRIER ".sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FLASH_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile(FLASH_BARRIER ".arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
#undef FLASH_BARRIER

/// All four warps of a warpgroup call these. Growing waits for registers that others gave back.
template <int kRegisters>
FLASH_DEVICE void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FLASH_DEVICE void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace flash::ptx
