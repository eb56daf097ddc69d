// SPDX-License-Identifier: BSD-3-Clause
// Barriers of a part of the CTA, and the register budget of a warpgroup.
#pragma once

#include "primitives/device.cuh"

namespace flash::ptx {

FLASH_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FLASH_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

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
