// SPDX-License-Identifier: BSD-3-Clause
// Four 8x8 matrices of 16-bit elements from shared memory. Lane l names row l % 8 of matrix l / 8
// (16 bytes, aligned); then lane l holds columns 2 (l % 4), 2 (l % 4) + 1 of row l / 4 of each, or
// of its transpose.
#pragma once

#include "primitives/device.cuh"

namespace flash {

FLASH_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

FLASH_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

}  // namespace flash
