// SPDX-License-Identifier: BSD-3-Clause
// What the kernels that compute one value per pair, or sums of them, share: their tile.
#pragma once

#include "cuda/common/query_block.cuh"
#include "cuda/launch.cuh"

namespace flash::cuda {

template <DType kDType>
struct PairTraits {
  static constexpr Variant kVariant = Variant::kGeneral;
  static constexpr int kCols = 64;
  using Element = cuda::Element<kDType>;
  using Real = Accumulator<Element>;
  using Tile = FmaTile<Real>;
  static constexpr int kRows = Tile::kRows, kThreads = Tile::kThreads;

  struct SharedStorage {
    FmaStages<Tile, kCols> stages;
    ScoreTile<Tile, kCols, kVariant> scores;
    Real per_warp[8][kCols];
  };
};

/// Sum of x over the CTA in a fixed order; every thread must call, thread 0 gets the result.
template <class Real>
__device__ __forceinline__ Real sum_over_cta(Real x, Real (&per_warp)[8]) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  __syncthreads();
  if (threadIdx.x % 32 == 0) per_warp[threadIdx.x / 32] = x;
  __syncthreads();
  Real sum = 0;
  for (int warp = 0; warp < 8; ++warp) sum += per_warp[warp];
  return sum;
}

}  // namespace flash::cuda
