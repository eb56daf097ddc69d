// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "cuda/sm90/traits.cuh"
#include "primitives/numeric.cuh"
#include "primitives/ptx/stmatrix.cuh"

namespace flash::cuda::sm90 {

/// factor[r] * acc, 64 rows of a warpgroup, to the rows at `target` of a swizzled tile of kRows
/// rows, for TMA behind a fence_proxy_async. Row r of a thread, 0 or 1: those it holds, 8 apart.
template <class Element, int kRows, int kCount>
FLASH_DEVICE void put_rows(const float (&acc)[kCount], const float (&factor)[2], uint32_t target) {
  const int lane = threadIdx.x % 32, warp = warp_uniform(threadIdx.x / 32 % 4);
#pragma unroll
  for (int i = 0; i < kCount; i += 8) {  // 16 columns
    uint32_t packed[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      packed[j] = pack<Element>(acc[i + 2 * j] * factor[j & 1], acc[i + 2 * j + 1] * factor[j & 1]);
    }
    const int unit = (i % 32 / 4 + lane / 16) ^ (lane & 7);  // swizzled 16 bytes of the row
    ptx::stmatrix_x4(target + i / 32 * kRows * 128 + (warp * 16 + lane % 16) * 128 + unit * 16,
                     packed);
  }
}

}  // namespace flash::cuda::sm90
