// SPDX-License-Identifier: BSD-3-Clause
// dbias for every backend: P and dS recomputed from lse, no atomics, one rounding, no N x N memory.
#pragma once

#include "cuda/common/bias_tile.cuh"
#include "cuda/common/pair_kernels.cuh"

namespace flash::cuda {

/// Adds up the rows of a tile of registers, in a fixed order; the result lands in row 0.
template <class Traits, class Real>
__device__ __forceinline__ void sum_rows(Real (&acc)[Traits::Tile::kThreadRows][Traits::kCols / 8],
                                         Real (&per_warp)[8][Traits::kCols]) {
  using Tile = typename Traits::Tile;
#pragma unroll
  for (int j = 0; j < Traits::kCols / 8; ++j) {
    Real sum = 0;
#pragma unroll
    for (int i = 0; i < Tile::kThreadRows; ++i) sum += acc[i][j];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 16);
    if (Tile::first_row() % (Tile::kRowLanes * Tile::kThreadRows) == 0)
      per_warp[threadIdx.x / 32][Tile::col(j)] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < Traits::kCols / 8; ++j) {
    acc[0][j] = 0;
    for (int warp = 0; warp < 8; ++warp) acc[0][j] += per_warp[warp][Tile::col(j)];
  }
}

/// Adds up the columns of a tile of registers; the result lands in column 0.
template <class Traits, class Real>
__device__ __forceinline__ void sum_cols(
    Real (&acc)[Traits::Tile::kThreadRows][Traits::kCols / 8]) {
#pragma unroll
  for (int i = 0; i < Traits::Tile::kThreadRows; ++i) {
    Real sum = 0;
#pragma unroll
    for (int j = 0; j < Traits::kCols / 8; ++j) sum += acc[i][j];
    acc[i][0] = reduce_row(sum, [](Real a, Real b) { return a + b; });
  }
}

template <class Traits, class Params, class BiasElement>
__global__ void __launch_bounds__(Traits::kThreads)
    backward_bias_kernel(const __grid_constant__ Params p, const RowView delta) {
  using Tile = typename Traits::Tile;
  using Real = typename Traits::Real;
  using Block = QueryBlock<Traits, Params>;
  constexpr int kRows = Traits::kRows, kCols = Traits::kCols;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_bytes);
  const auto own = BiasTile<kRows, kCols>::of(p, blockIdx.x);

  typename Block::Registers acc = {};
  int stage = 0;
#pragma unroll 1
  for (int batch = own.batches.begin; batch < own.batches.end; ++batch)
#pragma unroll 1
    for (int head = own.heads.begin; head < own.heads.end; ++head)
#pragma unroll 1
      for (int m = own.m_blocks.begin; m < own.m_blocks.end; ++m) {
        const Block block(p, delta, batch, head, m);
        if (block.is_empty()) continue;
#pragma unroll 1
        for (int n = own.n_blocks.begin; n < own.n_blocks.end; ++n) {
          if (!block.visits(n)) continue;
          block.for_each_gradient(shared.scores, shared.stages, stage, n,
                                  [&](int i, int j, Real ds) { acc[i][j] += ds; });
        }
      }

  if (p.bias_shape[2] == 1) sum_rows<Traits>(acc, shared.per_warp);
  if (p.bias_shape[3] == 1) sum_cols<Traits>(acc);
  const int64_t matrix = int64_t(own.batch) * p.bias_shape[1] + own.head;
#pragma unroll
  for (int i = 0; i < Tile::kThreadRows; ++i)
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
      const int q = own.row * kRows + Tile::row(i), k = own.col * kCols + Tile::col(j);
      if (q < p.bias_shape[2] && k < p.bias_shape[3])
        static_cast<BiasElement*>(p.dbias)[(matrix * p.bias_shape[2] + q) * p.bias_shape[3] + k] =
            narrow<BiasElement>(acc[i][j]);
    }
}

template <DType kDType, class Params>
void launch_backward_bias(const Params& p, const RowView& delta, void* stream) {
  using Traits = PairTraits<kDType>;
  const int64_t ctas = BiasTile<Traits::kRows, Traits::kCols>::count(p);
  const auto run = [&]<class BiasElement>() {
    launch(backward_bias_kernel<Traits, Params, BiasElement>, ctas, Traits::kThreads,
           sizeof(typename Traits::SharedStorage), stream, p, delta);
  };
  if (p.features.score_mod.bias_is_float32)
    run.template operator()<float>();
  else
    run.template operator()<Element<kDType>>();
}

}  // namespace flash::cuda
