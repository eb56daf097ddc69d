// SPDX-License-Identifier: BSD-3-Clause
// dQ = scale dS K on CUDA cores: any head dim, any dtype, deterministic.
//
// One CTA computes a panel of kPanel columns of dQ for kRows query rows of one (sequence, head).
// Per block of kCols keys:
//
//   S = Q K^T, E = P = exp(S - lse)          E to shared memory, read by the warp that wrote it
//   dP = dO V^T, E = dS = E o (dP - delta)
//   dQ += E K
//
// The same kernel differentiates the attention weights: there dP is given, and dlse = -rowsum(dS).
#pragma once

#include "cuda/common/query_block.cuh"
#include "cuda/launch.cuh"
#include "cuda/tile_config.h"

namespace flash::cuda::simt {

template <DType kDType, int kPanel_, Variant kVariant_, int kCols_ = simt_cols(kDType, kVariant_)>
struct BackwardTraits {
  static constexpr Variant kVariant = kVariant_;
  static constexpr int kCols = kCols_, kPanel = kPanel_;
  using Element = cuda::Element<kDType>;
  using Real = Accumulator<Element>;
  using Tile = FmaTile<Real>;
  static constexpr int kRows = Tile::kRows;
  static_assert(kRows == simt_rows(kDType), "the host counts row blocks by simt_rows");

  struct SharedStorage {
    FmaStages<Tile, (kCols > kPanel ? kCols : kPanel)> stages;
    ScoreTile<Tile, kCols, kVariant> scores;
  };
};

template <class Traits, class Params>
__global__ void __launch_bounds__(Traits::Tile::kThreads)
    backward_q_kernel(const __grid_constant__ Params p, const RowView delta, const CtaGrid grid) {
  using Tile = typename Traits::Tile;
  using Real = typename Traits::Real;
  using Element = typename Traits::Element;
  using Block = QueryBlock<Traits, Params>;
  constexpr int kCols = Traits::kCols, kPanel = Traits::kPanel;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_bytes);

  const CtaPlace cta = CtaPlace::of(blockIdx.x, grid);
  const Block block(p, delta, cta.batch, cta.head, cta.block);
  if (block.is_empty()) return;

  typename Tile::template Registers<kPanel> acc_dq = {};
  Real ds_sum[Tile::kThreadRows] = {};
  int stage = 0;
#pragma unroll 1
  for (int n = block.range.visit.begin; n < block.range.visit.end; ++n) {
    block.weights(shared.scores, shared.stages, stage, n);
    typename Block::Registers acc = {};
    block.weight_gradients(acc, shared.stages, stage, n);
    shared.scores.write_gradients(block.score, [&](int i, int j, Real weight) {
      const Real ds = block.gradient(i, j, n, weight, acc[i][j]);
      ds_sum[i] += ds;
      return ds;
    });
    if (p.dq.data)
      product_ab<Tile, kPanel>(acc_dq, shared.scores.exchange, shared.stages.b, stage, block.k,
                               n * kCols, cta.panel * kPanel);
  }

  if constexpr (kGradientIsGiven<Params>) {
    if (p.dlse.data && cta.panel == 0) {
      Real* dlse = static_cast<Real*>(p.dlse.data) + p.dlse.offset(block.q_seq, cta.head);
#pragma unroll
      for (int i = 0; i < Tile::kThreadRows; ++i) {
        const Real sum = reduce_row(ds_sum[i], [](Real a, Real b) { return a + b; });
        const int row = block.first_q + Tile::row(i);
        if (Tile::first_col() == 0 && row < block.q_seq.length) dlse[row] = -sum;
      }
    }
  }
  if (!p.dq.data) return;
  store_rows<Tile, kPanel>(static_cast<Element*>(p.dq.data) + p.dq.offset(block.q_seq, cta.head),
                           p.dq.row_stride, block.q_seq.length, p.head_dim, block.first_q,
                           cta.panel * kPanel,
                           [&](int i, int j) { return acc_dq[i][j] * block.score.scale; });
}

template <DType kDType, int kPanel, Variant kVariant, class Params>
void launch_backward_q(const Params& p, const RowView& delta, void* stream) {
  using Traits = BackwardTraits<kDType, kPanel, kVariant>;
  const int panels = int(ceil_div(p.dq.data && p.head_dim > 0 ? p.head_dim : 1, kPanel));
  const int blocks = int(ceil_div(p.q_layout.max, Traits::kRows));
  const CtaGrid grid = CtaGrid::of(p, panels, blocks, p.num_heads, CtaGrid::Longest::kLastRows);
  launch(backward_q_kernel<Traits, Params>, grid.ctas(), Traits::Tile::kThreads,
         sizeof(typename Traits::SharedStorage), stream, p, delta, grid);
}

}  // namespace flash::cuda::simt
