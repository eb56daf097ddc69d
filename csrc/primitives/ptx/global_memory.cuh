// SPDX-License-Identifier: BSD-3-Clause
// Vector accesses to global memory.
#pragma once

#include "primitives/device.cuh"

namespace flash::ptx {

/// 16 bytes. The assignment of a uint4 may become four stores of 4 bytes.
FLASH_DEVICE void store_global_v4(void* global, const uint32_t (&v)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}

}  // namespace flash::ptx
