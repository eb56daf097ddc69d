// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "cuda/common/weight_gradient.cuh"
#include "primitives/fma_tile.cuh"

namespace flash::cuda {

/// kRows query rows of one (sequence, head), for kernels that recompute P and dS from lse. Rows of
/// the tiles are queries, columns are keys.
template <class Traits, class Params>
struct QueryBlock {
  using Element = typename Traits::Element;
  using Real = Accumulator<Element>;
  using Tile = FmaTile<Real>;
  using Score = PairScore<Element, Traits::kVariant>;
  using Keys = AttendedKeys<Element, Traits::kVariant>;
  using Scores = typename Tile::template Registers<Traits::kCols>;
  static constexpr int kRows = Tile::kRows, kCols = Traits::kCols, kVec = Tile::kVec;

  const Params& p;
  Sequence q_seq, k_seq;
  int head, first_q;
  IntervalMask mask;
  Score score;
  MatrixRows<Real, Element> q;
  MatrixRows<Real, Element, Keys> k;
  BlockRanges range;
  Real lse[kVec], delta[kVec];

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
    for (int i = 0; i < kVec; ++i) {
      lse[i] = lse_of<Real>(p.lse, q_seq, head, first_q + Tile::row(i));
      delta[i] = delta_of<Real>(delta_view, q_seq, head, first_q + Tile::row(i));
    }
  }

  __device__ __forceinline__ int head_k() const { return head / p.gqa_ratio(); }
  __device__ __forceinline__ bool is_empty() const { return first_q >= q_seq.length; }
  __device__ __forceinline__ bool visits(int n) const {
    return n >= range.visit.begin && n < range.visit.end;
  }

  /// P of the keys of block n, signed as PairScore says.
  template <class Stages>
  __device__ __forceinline__ void weights(Scores& acc, Scores& slope, Stages& stages, int& stage,
                                          int n) const {
    product_abt<kCols>(acc, stages, stage, q, first_q, k, n * kCols, p.head_dim);
    const bool needs_mask = n < range.full.begin || n >= range.full.end;
#pragma unroll
    for (int i = 0; i < kVec; ++i)
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j) {
        const int row = first_q + Tile::row(i), col = n * kCols + Tile::col(j);
        acc[i][j] = score.signed_weight(acc[i][j], row, col, !needs_mask || mask.keep(row, col),
                                        lse[i], slope[i][j]);
      }
  }

  /// dS, the gradient of the scores after their modifications, from P; into `acc`.
  template <class Stages>
  __device__ __forceinline__ void gradients(Scores& acc, const Scores& weight, Stages& stages,
                                            int& stage, int n) const {
    if constexpr (!kGradientIsGiven<Params>) {
      const MatrixRows<Real, Element> dout(p.dout.data, p.dout.offset(q_seq, head),
                                           p.dout.row_stride, q_seq.length, p.head_dim_v);
      const MatrixRows<Real, Element, Keys> v(p.v.data, p.v.offset(k_seq, head_k()),
                                              p.v.row_stride, k_seq.length, p.head_dim_v, k.keep);
      product_abt<kCols>(acc, stages, stage, dout, first_q, v, n * kCols, p.head_dim_v);
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i)
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j) {
        if constexpr (kGradientIsGiven<Params>)
          acc[i][j] = given_gradient<Element>(
              p, {score.batch, head, first_q + Tile::row(i), n * kCols + Tile::col(j)});
        acc[i][j] = score.gradient(weight[i][j], acc[i][j], delta[i]);
      }
  }
};

}  // namespace flash::cuda
