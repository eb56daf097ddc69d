// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#define FLASH_DEVICE __device__ __forceinline__

namespace flash {

/// The 32-bit address that PTX instructions on shared memory take.
FLASH_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Reads a T of 2 or 4 bytes.
template <class T>
FLASH_DEVICE T load_shared(uint32_t address) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4);
  if constexpr (sizeof(T) == 2) {
    uint16_t bits;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(address));
    return reinterpret_cast<const T&>(bits);
  } else {
    uint32_t bits;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(bits) : "r"(address));
    return reinterpret_cast<const T&>(bits);
  }
}

/// A value that is equal in all lanes, told to ptxas: descriptors built from it need no R2UR.
FLASH_DEVICE int warp_uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

}  // namespace flash
