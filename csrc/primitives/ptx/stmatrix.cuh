// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "primitives/device.cuh"

namespace flash::ptx {

/// Four 8x8 matrices of 16-bit elements from accumulator layout to rows in shared memory; lane l
/// gives the address of row l % 8 of matrix l / 8.
FLASH_DEVICE void stmatrix_x4(uint32_t shared, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

/// The same with every matrix transposed.
FLASH_DEVICE void stmatrix_x4_transposed(uint32_t shared, const uint32_t* r) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}

}  // namespace flash::ptx
