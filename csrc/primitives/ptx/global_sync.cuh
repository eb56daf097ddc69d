// SPDX-License-Identifier: BSD-3-Clause
// Counters in global memory through which CTAs of one grid order their work.
#pragma once

#include "primitives/device.cuh"

namespace flash::ptx {

FLASH_DEVICE int load_acquire(const int* address) {
  int value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
FLASH_DEVICE void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
FLASH_DEVICE void add_relaxed(int* address) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(address) : "memory");
}
/// Between ordinary and bulk accesses to global memory.
FLASH_DEVICE void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

}  // namespace flash::ptx
