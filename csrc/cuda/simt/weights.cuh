// SPDX-License-Identifier: BSD-3-Clause
// W = exp(s - lse) after dropout, of every head or averaged over them. One CTA per tile of kRows
// queries x kCols keys of the result; the average walks the heads in order.
#pragma once

#include "cuda/common/pair_kernels.cuh"

namespace flash::cuda::simt {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    weights_kernel(const __grid_constant__ WeightsParams p, int row_blocks, int col_blocks) {
  using Tile = typename Traits::Tile;
  using Real = typename Traits::Real;
  using Element = typename Traits::Element;
  using Block = QueryBlock<Traits, WeightsParams>;
  constexpr int kCols = Traits::kCols;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_bytes);

  int64_t index = blockIdx.x;
  const int n = int(index % col_blocks);
  index /= col_blocks;
  const int m = int(index % row_blocks);
  const int64_t matrix = index / row_blocks;
  const int heads = p.average ? p.num_heads : 1;
  const int batch = int(p.average ? matrix : matrix / p.num_heads);
  const int first_head = p.average ? 0 : int(matrix % p.num_heads);

  typename Block::Registers acc = {};
  int stage = 0;
#pragma unroll 1
  for (int head = first_head; head < first_head + heads; ++head) {
    const Block block(p, RowView{}, batch, head, m);
    if (block.is_empty() || !block.visits(n)) continue;
    block.weights(shared.scores, shared.stages, stage, n);
    shared.scores.exchange.update([&](int i, int j, Real weight) {
      acc[i][j] += block.score.after_dropout(weight);
      return weight;
    });
  }
  store_rows<Tile, kCols>(
      static_cast<Element*>(p.weights) + matrix * p.q_layout.max * p.k_layout.max, p.k_layout.max,
      p.q_layout.max, p.k_layout.max, m * Traits::kRows, n * kCols,
      [&](int i, int j) { return acc[i][j] / Real(heads); });
}

template <DType kDType>
void launch_weights(const WeightsParams& p, void* stream) {
  using Traits = PairTraits<kDType>;
  const int rows = int(ceil_div(p.q_layout.max, Traits::kRows));
  const int cols = int(ceil_div(p.k_layout.max, Traits::kCols));
  launch(weights_kernel<Traits>, int64_t(p.batch) * (p.average ? 1 : p.num_heads) * rows * cols,
         Traits::kThreads, sizeof(typename Traits::SharedStorage), stream, p, rows, cols);
}

}  // namespace flash::cuda::simt
