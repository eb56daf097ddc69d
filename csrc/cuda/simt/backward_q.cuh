// SPDX-License-Identifier: BSD-3-Clause
// dQ = scale dS K on CUDA cores: any head dim, any dtype, deterministic.
//
// One CTA computes a panel of kPanel columns of dQ for kRows query rows of one (sequence, head). Per
// block of kCols keys it recomputes S = Q K^T, P = exp(S - lse), dP = dO V^T and
// dS = P o (dP - delta), and adds dS K. The same kernel differentiates the attention weights: there
// dP is given, and dlse = -rowsum(dS).
#pragma once

#include "cuda/common/query_block.cuh"
#include "cuda/launch.cuh"
#include "cuda/tile_config.h"

namespace flash::cuda::simt {

template <DType kDType, int kPanel_, Variant kVariant_>
struct BackwardTraits {
  static constexpr Variant kVariant = kVariant_;
  static constexpr SimtTile kConfig = simt_backward_tile(kDType, kPanel_, kVariant);
  static constexpr int kCols = kConfig.cols, kPanel = kPanel_, kMinCtas = kConfig.min_ctas;
  using Element = cuda::Element<kDType>;
  using Real = Accumulator<Element>;
  using Tile = FmaTile<Real>;
  static constexpr int kRows = Tile::kRows;
  static_assert(kRows == simt_rows(kDType), "the host counts row blocks by simt_rows");

  struct SharedStorage {
    FmaStages<Real, (kCols > kPanel ? kCols : kPanel)> stages;
    FmaExchange<Real, kCols> exchange;
    Real lse[kCols], delta[kCols];  // backward_kv.cuh: of the queries of the tile
  };
};

template <class Traits, class Params>
__global__ void __launch_bounds__(Traits::Tile::kThreads, Traits::kMinCtas)
    backward_q_kernel(const __grid_constant__ Params p, const RowView delta, int panels,
                      int blocks) {
  using Tile = typename Traits::Tile;
  using Real = typename Traits::Real;
  using Element = typename Traits::Element;
  using Block = QueryBlock<Traits, Params>;
  constexpr int kCols = Traits::kCols, kPanel = Traits::kPanel, kVec = Tile::kVec;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_bytes);

  const CtaPlace cta = CtaPlace::of(blockIdx.x, panels, blocks, p.num_heads);
  const Block block(p, delta, cta.batch, cta.head, cta.block);
  if (block.is_empty()) return;

  typename Tile::template Registers<kPanel> acc_dq = {};
  Real ds_sum[kVec] = {};
  int stage = 0;
#pragma unroll 1
  for (int n = block.range.visit.begin; n < block.range.visit.end; ++n) {
    typename Block::Scores weight = {}, slope, ds = {};
    block.weights(weight, slope, shared.stages, stage, n);
    block.gradients(ds, weight, shared.stages, stage, n);
    if constexpr (kGradientIsGiven<Params>) {
#pragma unroll
      for (int i = 0; i < kVec; ++i)
#pragma unroll
        for (int j = 0; j < kCols / 8; ++j) ds_sum[i] += ds[i][j];
    }
    if (!p.dq.data) continue;
    shared.exchange.write(
        [&](int i, int j) { return block.score.backward(ds[i][j], slope[i][j]); });
    product_ab<kPanel>(acc_dq, shared.exchange, shared.stages, stage, block.k, n * kCols,
                       cta.panel * kPanel);
  }

  if constexpr (kGradientIsGiven<Params>) {
    if (p.dlse.data && cta.panel == 0) {
      Real* dlse = static_cast<Real*>(p.dlse.data) + p.dlse.offset(block.q_seq, cta.head);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const Real sum = reduce_row(ds_sum[i], [](Real a, Real b) { return a + b; });
        const int row = block.first_q + Tile::row(i);
        if (Tile::first_col() == 0 && row < block.q_seq.length) dlse[row] = -sum;
      }
    }
  }
  if (!p.dq.data) return;
  store_rows<kPanel, Real>(static_cast<Element*>(p.dq.data) + p.dq.offset(block.q_seq, cta.head),
                           p.dq.row_stride, block.q_seq.length, p.head_dim, block.first_q,
                           cta.panel * kPanel,
                           [&](int i, int j) { return acc_dq[i][j] * block.score.scale; });
}

template <DType kDType, int kPanel, Variant kVariant, class Params>
void launch_backward_q(const Params& p, const RowView& delta, void* stream) {
  using Traits = BackwardTraits<kDType, kPanel, kVariant>;
  const int panels = int(ceil_div(p.dq.data && p.head_dim > 0 ? p.head_dim : 1, kPanel));
  const int blocks = int(ceil_div(p.q_layout.max, Traits::kRows));
  launch(backward_q_kernel<Traits, Params>, int64_t(panels) * blocks * p.num_heads * p.batch,
         Traits::Tile::kThreads, sizeof(typename Traits::SharedStorage), stream, p, delta, panels,
         blocks);
}

}  // namespace flash::cuda::simt
