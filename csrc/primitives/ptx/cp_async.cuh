// SPDX-License-Identifier: BSD-3-Clause
// Asynchronous copies from global to shared memory (sm_80): they bypass the registers, and a thread
// waits for the groups that it committed itself.
#pragma once

#include "primitives/device.cuh"

namespace flash {

/// 16 bytes, both addresses aligned to 16. Where `valid` is false nothing is read and zeros arrive.
FLASH_DEVICE void cp_async_16(uint32_t shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(bytes)
               : "memory");
}

/// kBytes of 4, 8 or 16, to which both addresses are aligned. Fewer than 16 go through L1.
template <int kBytes>
FLASH_DEVICE void cp_async(uint32_t shared, const void* global, bool valid) {
  if constexpr (kBytes == 16) {
    cp_async_16(shared, global, valid);
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(global),
                 "n"(kBytes), "r"(valid ? kBytes : 0)
                 : "memory");
  }
}

FLASH_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Until at most kPending of this thread's latest groups are still under way.
template <int kPending>
FLASH_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
/// Until all copies of this thread are done, committed or not.
FLASH_DEVICE void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace flash
