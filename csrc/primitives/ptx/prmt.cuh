// SPDX-License-Identifier: BSD-3-Clause
// Bytes of a register in another order (PTX ISA, "prmt").
#pragma once

#include "primitives/device.cuh"

namespace flash::ptx {

/// Byte i is the byte of x that nibble i of the selector names, or, with 8 added, eight times the
/// top bit of that byte.
template <unsigned kSelector>
FLASH_DEVICE uint32_t permute_bytes(uint32_t x) {
  uint32_t result;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(result) : "r"(x), "n"(kSelector));
  return result;
}

}  // namespace flash::ptx
