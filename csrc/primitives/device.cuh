// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#define FLASH_DEVICE __device__ __forceinline__

namespace flash {

/// The 32-bit address that PTX instructions on shared memory take.
FLASH_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// A value that is equal in all lanes, told to ptxas: descriptors built from it need no R2UR.
FLASH_DEVICE int warp_uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

}  // namespace flash
