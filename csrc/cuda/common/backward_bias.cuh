// SPDX-License-Identifier: BSD-3-Clause
// dbias = dS summed over the dimensions that the bias broadcasts, for every backend. One CTA owns a
// tile of the bias's own shape, walks the broadcast dimensions in a fixed order (batch, heads,
// query blocks, key blocks) and recomputes P and dS from lse: no atomics, one rounding, no N x N
// memory.
#pragma once

#include "cuda/common/pair_kernels.cuh"

namespace flash::cuda {

/// Blocks of rows and columns of the bias's own shape: 1 where it broadcasts.
struct BiasBlocks {
  int rows, cols;
};

/// The indices of one dimension that a CTA walks: all of them where the bias broadcasts.
__device__ __forceinline__ Range walked(int bias_size, int own_index, int count) {
  if (bias_size == 1 && count != 1) return {0, count};
  return {own_index, own_index + 1};
}

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
    backward_bias_kernel(const __grid_constant__ Params p, const RowView delta,
                         const BiasBlocks blocks) {
  using Tile = typename Traits::Tile;
  using Real = typename Traits::Real;
  using Block = QueryBlock<Traits, Params>;
  constexpr int kRows = Traits::kRows, kCols = Traits::kCols;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_bytes);

  int64_t index = blockIdx.x;
  const int own_col = int(index % blocks.cols);
  index /= blocks.cols;
  const int own_row = int(index % blocks.rows);
  index /= blocks.rows;
  const int own_head = int(index % p.bias_shape[1]), own_batch = int(index / p.bias_shape[1]);
  const Range batches = walked(p.bias_shape[0], own_batch, p.batch);
  const Range heads = walked(p.bias_shape[1], own_head, p.num_heads);
  const bool one_row = p.bias_shape[2] == 1, one_col = p.bias_shape[3] == 1;
  const Range rows = walked(p.bias_shape[2], own_row, int(ceil_div(p.q_layout.max, kRows)));
  const Range cols = walked(p.bias_shape[3], own_col, int(ceil_div(p.k_layout.max, kCols)));

  typename Block::Registers acc = {};
  int stage = 0;
#pragma unroll 1
  for (int batch = batches.begin; batch < batches.end; ++batch)
#pragma unroll 1
    for (int head = heads.begin; head < heads.end; ++head)
#pragma unroll 1
      for (int m = rows.begin; m < rows.end; ++m) {
        const Block block(p, delta, batch, head, m);
        if (block.is_empty()) continue;
#pragma unroll 1
        for (int n = cols.begin; n < cols.end; ++n) {
          if (!block.visits(n)) continue;
          block.for_each_gradient(shared.scores, shared.stages, stage, n,
                                  [&](int i, int j, Real ds) { acc[i][j] += ds; });
        }
      }

  if (one_row) sum_rows<Traits>(acc, shared.per_warp);
  if (one_col) sum_cols<Traits>(acc);
  const int64_t matrix = int64_t(own_batch) * p.bias_shape[1] + own_head;
#pragma unroll
  for (int i = 0; i < Tile::kThreadRows; ++i)
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
      const int q = own_row * kRows + Tile::row(i), k = own_col * kCols + Tile::col(j);
      if (q < p.bias_shape[2] && k < p.bias_shape[3])
        static_cast<BiasElement*>(p.dbias)[(matrix * p.bias_shape[2] + q) * p.bias_shape[3] + k] =
            narrow<BiasElement>(acc[i][j]);
    }
}

template <DType kDType, class Params>
void launch_backward_bias(const Params& p, const RowView& delta, void* stream) {
  using Traits = PairTraits<kDType>;
  const BiasBlocks blocks{int(ceil_div(p.bias_shape[2], Traits::kRows)),
                          int(ceil_div(p.bias_shape[3], Traits::kCols))};
  const int64_t ctas = int64_t(p.bias_shape[0]) * p.bias_shape[1] * blocks.rows * blocks.cols;
  const auto run = [&]<class BiasElement>() {
    launch(backward_bias_kernel<Traits, Params, BiasElement>, ctas, Traits::kThreads,
           sizeof(typename Traits::SharedStorage), stream, p, delta, blocks);
  };
  if (p.features.score_mod.bias_is_float32)
    run.template operator()<float>();
  else
    run.template operator()<Element<kDType>>();
}

}  // namespace flash::cuda
