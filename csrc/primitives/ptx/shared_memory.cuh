// SPDX-License-Identifier: BSD-3-Clause
// Vector accesses to shared memory by 32-bit address.
#pragma once

#include "primitives/device.cuh"

namespace flash::ptx {

FLASH_DEVICE float2 load_shared_v2(uint32_t shared) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(shared));
  return v;
}
FLASH_DEVICE void load_shared_v4(uint32_t* v, uint32_t shared) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(shared)
               : "memory");
}
FLASH_DEVICE void store_shared_v4(uint32_t shared, const uint32_t* v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}
FLASH_DEVICE void store_shared_v4(uint32_t shared, const float* v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "f"(v[0]), "f"(v[1]),
               "f"(v[2]), "f"(v[3])
               : "memory");
}

}  // namespace flash::ptx
