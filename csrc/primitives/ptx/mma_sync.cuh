// SPDX-License-Identifier: BSD-3-Clause
// D += A B of one warp: A (16 x 16), B (16 x 8), D (16 x 8) in fp32. With g = lane / 4 and
// t = lane % 4, a lane holds
//   A: rows g, g + 8, columns 2t.. and 2t + 8..   {(g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t +
//   8)} B: columns g, rows 2t.. and 2t + 8..          {(2t, g), (2t + 8, g)} D: {(g, 2t), (g, 2t +
//   1), (g + 8, 2t), (g + 8, 2t + 1)}
// where an A or B register is a pair of neighbours along the shared dimension.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "primitives/device.cuh"

namespace flash {

template <class Element>
FLASH_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
FLASH_DEVICE void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
FLASH_DEVICE void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace flash
