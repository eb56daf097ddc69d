// SPDX-License-Identifier: BSD-3-Clause
// Sums in global memory that several CTAs add to.
#pragma once

#include "primitives/device.cuh"

namespace flash {

/// sum[i] += x[i], each addition atomic; sum is aligned to 16 bytes. One instruction from sm_90 on.
FLASH_DEVICE void red_add_quad(float* sum, const float (&x)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(sum), "f"(x[0]),
               "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
#else
  for (int i = 0; i < 4; ++i)
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(sum + i), "f"(x[i]) : "memory");
#endif
}

/// A counter in global memory by which CTAs take turns. All threads of a CTA wait; one passes the
/// turn on, after a barrier that all threads reach behind their additions and a __threadfence().
FLASH_DEVICE void wait_for_turn(const int* counter, int turn) {
  if (threadIdx.x == 0) {
    int now;
    do {
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    } while (now != turn);
  }
  __syncthreads();
}
FLASH_DEVICE void pass_turn(int* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

}  // namespace flash
