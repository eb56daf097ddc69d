// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <climits>

#include "cuda/sm90/key_runs.h"
#include "primitives/device.cuh"

namespace flash::cuda::sm90 {

/// A CTA finds the run of one row of the mask: grid (heads, batch) of the mask, in one dimension.
__global__ void key_runs_kernel(PairView mask, int seqlen_k, int heads, KeyRuns runs) {
  __shared__ int begin, end, kept;
  if (threadIdx.x == 0) begin = INT_MAX, end = 0, kept = 0;
  __syncthreads();

  const int batch = blockIdx.x / heads, head = blockIdx.x % heads;
  const auto row = static_cast<const uint8_t*>(mask.data) + mask.offset({batch, head, 0, 0});
  int own_begin = INT_MAX, own_end = 0, own_kept = 0;
#pragma unroll 8
  for (int k = threadIdx.x; k < seqlen_k; k += blockDim.x) {
    if (row[k * mask.k_stride] == 0) continue;
    own_begin = min(own_begin, k);
    own_end = k + 1;
    ++own_kept;
  }
  own_begin = __reduce_min_sync(0xffffffffu, own_begin);
  own_end = __reduce_max_sync(0xffffffffu, own_end);
  own_kept = __reduce_add_sync(0xffffffffu, own_kept);
  if (threadIdx.x % 32 == 0) {
    atomicMin(&begin, own_begin);
    atomicMax(&end, own_end);
    atomicAdd(&kept, own_kept);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  const bool has_holes = kept > 0 && kept < end - begin;
  runs.of(batch, head) = {end, kept > 0 ? unsigned(begin) : 0u, has_holes};
  atomicAdd(&runs.count[has_holes], 1);
}

}  // namespace flash::cuda::sm90
