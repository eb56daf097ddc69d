// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "cuda/common/score_tile.cuh"
#include "cuda/common/weight_gradient.cuh"

namespace flash::cuda {

/// kRows query rows of one (sequence, head), for kernels that recompute P and dS from lse. Rows of
/// the tiles are queries, columns are keys.
template <class Traits, class Params>
struct QueryBlock {
  using Element = typename Traits::Element;
  using Real = Accumulator<Element>;
  using Tile = typename Traits::Tile;
  using Score = PairScore<Element, Traits::kVariant>;
  using Keys = AttendedKeys<Element, Traits::kVariant>;
  using Registers = typename Tile::template Registers<Traits::kCols>;
  static constexpr int kRows = Tile::kRows, kCols = Traits::kCols;
  static constexpr int kThreadRows = Tile::kThreadRows;

  const Params& p;
  Sequence q_seq, k_seq;
  int head, first_q;
  IntervalMask mask;
  Score score;
  MatrixRows<Real, Element> q;
  MatrixRows<Real, Element, Keys> k;
  BlockRanges range;
  Real lse[kThreadRows], delta[kThreadRows];

  __device__ __forceinline__ QueryBlock(const Params& p, const RowView& delta_view, int batch,
                                        int head, int block)
      : p(p),
        q_seq(Sequence::of(p.q_layout, batch)),
        k_seq(Sequence::of(p.k_layout, batch)),
        head(head),
        first_q(block * kRows),
        mask(p.mask_of(q_seq, k_seq)),
        score(p, batch, head, q_seq, k_seq),
        q(p.q.data, p.q.offset(q_seq, head), p.q.row_stride, q_seq.length, p.head_dim),
        k(p.k.data, p.k.offset(k_seq, head_k()), p.k.row_stride, k_seq.length, p.head_dim,
          Keys{p.features.score_mod, batch, head}),
        range(mask.key_blocks<kRows, kCols>(block)) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      lse[i] = lse_of<Real>(p.lse, q_seq, head, first_q + Tile::row(i));
      delta[i] = delta_of<Real>(delta_view, q_seq, head, first_q + Tile::row(i));
    }
  }

  __device__ __forceinline__ int head_k() const { return head / p.gqa_ratio(); }
  __device__ __forceinline__ bool is_empty() const { return first_q >= q_seq.length; }
  __device__ __forceinline__ bool visits(int n) const {
    return n >= range.visit.begin && n < range.visit.end;
  }

  /// P of the keys of block n, into `tile`.
  template <class Stages, class Scores>
  __device__ __forceinline__ void weights(Scores& tile, Stages& stages, int& stage, int n) const {
    Registers dots = {};
    product_abt<Tile, kCols>(dots, stages, stage, q, first_q, k, n * kCols, p.head_dim);
    const bool needs_mask = n < range.full.begin || n >= range.full.end;
    tile.write_weights(score, dots, [&](int i, int j) -> TilePlace<Real> {
      const int row = first_q + Tile::row(i), col = n * kCols + Tile::col(j);
      const bool kept = !needs_mask || mask.keep(row, col);
      return {row, col, kept && row < q_seq.length, lse[i]};
    });
  }

  /// dP of block n, where it is a product.
  template <class Stages>
  __device__ __forceinline__ void weight_gradients(Registers& acc, Stages& stages, int& stage,
                                                   int n) const {
    if constexpr (!kGradientIsGiven<Params>) {
      const MatrixRows<Real, Element> dout(p.dout.data, p.dout.offset(q_seq, head),
                                           p.dout.row_stride, q_seq.length, p.head_dim_v);
      const MatrixRows<Real, Element, Keys> v(p.v.data, p.v.offset(k_seq, head_k()), p.v.row_stride,
                                              k_seq.length, p.head_dim_v, k.keep);
      product_abt<Tile, kCols>(acc, stages, stage, dout, first_q, v, n * kCols, p.head_dim_v);
    }
  }
  /// dS of one pair, the gradient of its score after the modifications, from P and dP.
  __device__ __forceinline__ Real gradient(int i, int j, int n, Real weight, Real dp) const {
    if constexpr (kGradientIsGiven<Params>)
      dp = given_gradient<Element>(
          p, {score.batch, head, first_q + Tile::row(i), n * kCols + Tile::col(j)});
    return score.gradient(weight, dp, delta[i]);
  }

  /// f(i, j, dS) for every pair of block n.
  template <class Scores, class Stages, class F>
  __device__ __forceinline__ void for_each_gradient(Scores& tile, Stages& stages, int& stage, int n,
                                                    F f) const {
    weights(tile, stages, stage, n);
    Registers acc = {};
    weight_gradients(acc, stages, stage, n);
    tile.exchange.update([&](int i, int j, Real weight) {
      const Real ds = gradient(i, j, n, weight, acc[i][j]);
      f(i, j, ds);
      return ds;
    });
  }
};

}  // namespace flash::cuda
