// SPDX-License-Identifier: BSD-3-Clause
// How O = accO / l leaves the registers of a warpgroup, where not by put_rows: 64 rows, of which a
// thread holds two, 8 apart. `inverse`: 1 / l of both, with what dropout and a sink add; 0: the row
// weighs no key.
#pragma once

#include "cuda/sm90/traits.cuh"
#include "primitives/numeric.cuh"

namespace flash::cuda::sm90 {

/// A row that weighs no key is 0, whatever 0 times the values in its blocks has left there.
template <int kCount>
FLASH_DEVICE void clear_empty_rows(float (&accO)[kCount], const float (&inverse)[2]) {
  if (!__any_sync(0xffffffffu, inverse[0] == 0.f || inverse[1] == 0.f)) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (inverse[(i >> 1) & 1] == 0.f) accO[i] = 0.f;
}

/// To global memory: pairs of lanes exchange halves, so that a lane writes 8 bytes and a row 32
/// contiguous ones. `out`: the first row of this thread; `between`: elements to the second one.
template <class Element, int kCount>
FLASH_DEVICE void output_to_global(const float (&accO)[kCount], const float (&inverse)[2],
                                   uint16_t* out, int64_t between, const bool (&is_row)[2],
                                   int head_dim_v) {
  const int lane = threadIdx.x % 32, odd = lane & 1, column = odd * 8 + (lane & 2) * 2;
  out += column;
#pragma unroll
  for (int i = 0; i < kCount; i += 8) {  // 16 columns
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scale = inverse[r];
      const uint32_t low = pack<Element>(accO[i + 2 * r] * scale, accO[i + 2 * r + 1] * scale);
      const uint32_t high = pack<Element>(accO[i + 4 + 2 * r] * scale, accO[i + 5 + 2 * r] * scale);
      const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
      const uint2 value = odd ? make_uint2(other, high) : make_uint2(low, other);
      if (is_row[r] && 2 * i + column < head_dim_v)
        *reinterpret_cast<uint2*>(out + r * between + 2 * i) = value;
    }
  }
}

}  // namespace flash::cuda::sm90
