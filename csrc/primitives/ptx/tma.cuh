// SPDX-License-Identifier: BSD-3-Clause
// Tensor copies by the TMA unit (PTX ISA, "cp.async.bulk.tensor").
#pragma once

#include <cuda.h>

#include "primitives/device.cuh"

namespace flash::ptx {

// L2 policies as createpolicy encodes them.
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;
constexpr uint64_t kEvictLast = 0x14F0000000000000ull;

/// Box at (c0, c1, c2, c3) of the tensor to shared memory; its bytes are counted on `barrier`.
FLASH_DEVICE void tma_load_4d(uint32_t shared, const CUtensorMap& map, uint64_t* barrier, int c0,
                              int c1, int c2, int c3, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy)
      : "memory");
}

FLASH_DEVICE void tma_load_5d(uint32_t shared, const CUtensorMap& map, uint64_t* barrier, int c0,
                              int c1, int c2, int c3, int c4, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4),
      "l"(policy)
      : "memory");
}

FLASH_DEVICE void tma_store_4d(const CUtensorMap& map, uint32_t shared, int c0, int c1, int c2,
                               int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::
          "l"(&map),
      "r"(shared), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

FLASH_DEVICE void tma_store_5d(const CUtensorMap& map, uint32_t shared, int c0, int c1, int c2,
                               int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], "
      "[%1];" ::"l"(&map),
      "r"(shared), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

/// `bytes` consecutive bytes, a multiple of 16, counted on `barrier`.
FLASH_DEVICE void bulk_load(uint32_t shared, const void* global, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

/// global[i] += shared[i], fp32.
FLASH_DEVICE void bulk_reduce_add(float* global, uint32_t shared, int bytes, uint64_t policy) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.L2::cache_hint.add.f32 "
      "[%0], [%1], %2, %3;" ::"l"(global),
      "r"(shared), "r"(bytes), "l"(policy)
      : "memory");
}

FLASH_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

/// Returns when all but kPending groups of this thread have read their shared-memory source.
template <int kPending>
FLASH_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

/// Returns when all but kPending groups of this thread have been written to global memory.
template <int kPending>
FLASH_DEVICE void bulk_wait_written() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Makes this thread's writes to shared memory visible to wgmma and TMA; call before the barrier.
FLASH_DEVICE void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// Programmatic dependent launch; without the launch attribute both do nothing.
FLASH_DEVICE void wait_for_previous_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
FLASH_DEVICE void launch_next_grid() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace flash::ptx
