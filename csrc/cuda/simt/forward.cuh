// SPDX-License-Identifier: BSD-3-Clause
// FlashAttention-2, Algorithm 1, on CUDA cores: any head dim, any dtype.
//
// One CTA computes a panel of kPanel columns of O for kRows query rows of one (sequence, head);
// CTAs of further panels repeat the scores. Per block of kCols keys:
//
//   S = Q K^T       both streamed through shared memory in chunks of 16 columns of the head dim
//   m, l            a row's scores lie in 8 lanes of one warp: shuffles
//   E = P           to shared memory, transposed; read by the warp that wrote it
//   O += E V        V streamed in chunks of 16 keys
//
// Blocks that lie inside the mask skip its element test.
#pragma once

#include "attention/softmax.h"
#include "cuda/common/pair_score.cuh"
#include "cuda/launch.cuh"
#include "cuda/tile_config.h"
#include "primitives/fma_tile.cuh"

namespace flash::cuda::simt {

template <DType kDType, int kPanel_, Variant kVariant_>
struct ForwardTraits {
  static constexpr Variant kVariant = kVariant_;
  static constexpr int kCols = simt_cols(kDType, kVariant), kPanel = kPanel_;
  using Element = cuda::Element<kDType>;
  using Real = Accumulator<Element>;
  using Tile = FmaTile<Real>;
  static constexpr int kRows = Tile::kRows;
  static_assert(kRows == simt_rows(kDType), "the host counts row blocks by simt_rows");

  struct SharedStorage {
    FmaStages<Real, (kCols > kPanel ? kCols : kPanel)> stages;
    FmaExchange<Real, kCols> weights;
  };
};

/// Raw dot products -> scores, -inf where the pair is masked. Features are evaluated in a loop over
/// shared memory: unrolled, they would fit neither the registers nor the instruction cache.
template <class Traits, class Real, class Score, int kScoreCols>
__device__ __forceinline__ void modify_scores(Real (&acc_s)[Traits::Tile::kVec][kScoreCols],
                                              FmaExchange<Real, Traits::kCols>& exchange,
                                              const Score& score, const IntervalMask& mask,
                                              int first_q, int first_k, bool needs_mask) {
  using Tile = typename Traits::Tile;
  const auto modified = [&](int i, int j, Real dot) {
    const int q = first_q + Tile::row(i), k = first_k + Tile::col(j);
    // Features have no values for rows beyond the last query.
    if (Score::kGeneral && q >= mask.seqlen_q) return Real(-INFINITY);
    return needs_mask && !mask.keep(q, k) ? Real(-INFINITY) : score(dot, q, k).score;
  };
  if constexpr (Score::kGeneral) {
    exchange.write([&](int i, int j) { return acc_s[i][j]; });
    exchange.update_in_loop(modified);
    exchange.read(acc_s);
  } else {
#pragma unroll
    for (int i = 0; i < Tile::kVec; ++i)
#pragma unroll
      for (int j = 0; j < kScoreCols; ++j) acc_s[i][j] = modified(i, j, acc_s[i][j]);
  }
}

/// S -> P, with the running maximum and sum of the rows; O is rescaled.
template <class Traits, class Real, int kScoreCols, int kOutCols>
__device__ __forceinline__ void softmax_step(
    Real (&acc_s)[Traits::Tile::kVec][kScoreCols], Real (&acc_o)[Traits::Tile::kVec][kOutCols],
    OnlineSoftmaxRow<Real> (&softmax)[Traits::Tile::kVec]) {
#pragma unroll
  for (int i = 0; i < Traits::Tile::kVec; ++i) {
    Real block_max = acc_s[i][0];
#pragma unroll
    for (int j = 1; j < kScoreCols; ++j) block_max = fmax(block_max, acc_s[i][j]);
    block_max = reduce_row(block_max, [](Real a, Real b) { return fmax(a, b); });
    const Real factor = softmax[i].rescale(block_max);
    // A row without a finite score yet: exp(-inf - 0) = 0, and a NaN stays one.
    const Real offset = softmax[i].max == Real(-INFINITY) ? Real(0) : softmax[i].max;
    Real sum = 0;
#pragma unroll
    for (int j = 0; j < kScoreCols; ++j) {
      acc_s[i][j] = exp_of(acc_s[i][j] - offset);
      sum += acc_s[i][j];
    }
    softmax[i].sum += reduce_row(sum, [](Real a, Real b) { return a + b; });
#pragma unroll
    for (int j = 0; j < kOutCols; ++j) acc_o[i][j] *= factor;
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::Tile::kThreads)
    forward_kernel(const __grid_constant__ ForwardParams p, const CtaGrid grid) {
  using Tile = typename Traits::Tile;
  using Real = typename Traits::Real;
  using Element = typename Traits::Element;
  using Score = PairScore<Element, Traits::kVariant>;
  using Keys = AttendedKeys<Element, Traits::kVariant>;
  constexpr int kCols = Traits::kCols, kPanel = Traits::kPanel, kVec = Tile::kVec;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_bytes);

  const CtaPlace cta = CtaPlace::of(blockIdx.x, grid);
  const Sequence q_seq = Sequence::of(p.q_layout, cta.batch);
  const Sequence k_seq = Sequence::of(p.k_layout, cta.batch);
  const int first_q = cta.block * Traits::kRows, first_col = cta.panel * kPanel;
  if (first_q >= q_seq.length) return;

  const int head = cta.head, head_k = head / p.gqa_ratio();
  const IntervalMask mask = p.mask_of(q_seq, k_seq);
  const Score score(p, cta.batch, head, q_seq, k_seq);
  const Keys keys{p.features.score_mod, cta.batch, head};
  const MatrixRows<Real, Element> q(p.q.data, p.q.offset(q_seq, head), p.q.row_stride, q_seq.length,
                                    p.head_dim);
  const MatrixRows<Real, Element, Keys> k(p.k.data, p.k.offset(k_seq, head_k), p.k.row_stride,
                                          k_seq.length, p.head_dim, keys);
  const MatrixRows<Real, Element, Keys> v(p.v.data, p.v.offset(k_seq, head_k), p.v.row_stride,
                                          k_seq.length, p.head_dim_v, keys);

  OnlineSoftmaxRow<Real> softmax[kVec];
  typename Tile::template Registers<kPanel> acc_o = {};
  int stage = 0;
  const BlockRanges range = mask.key_blocks<Traits::kRows, kCols>(cta.block);
#pragma unroll 1
  for (int n = range.visit.begin; n < range.visit.end; ++n) {
    const bool needs_mask = n < range.full.begin || n >= range.full.end;
    typename Tile::template Registers<kCols> acc_s = {};
    product_abt<kCols>(acc_s, shared.stages, stage, q, first_q, k, n * kCols, p.head_dim);
    modify_scores<Traits>(acc_s, shared.weights, score, mask, first_q, n * kCols, needs_mask);
    softmax_step<Traits>(acc_s, acc_o, softmax);
    shared.weights.write([&](int i, int j) { return acc_s[i][j]; });
    if (score.drops())
      shared.weights.update_in_loop([&](int i, int j, Real weight) {
        return score.keeps(first_q + Tile::row(i), n * kCols + Tile::col(j)) ? weight : Real(0);
      });
    product_ab<kPanel>(acc_o, shared.weights.tile, shared.stages, stage, v, n * kCols, first_col);
  }

  Real inverse[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if constexpr (Score::kGeneral) {
      if (p.features.sink.enabled()) {
        const Real before = softmax[i].max;
        softmax[i].add_sink(p.features.sink.of<Real>(head));
        const Real factor = before == softmax[i].max ? Real(1) : exp_of(before - softmax[i].max);
#pragma unroll
        for (int j = 0; j < kPanel / 8; ++j) acc_o[i][j] *= factor;
      }
    }
    inverse[i] = softmax[i].sum == 0 ? Real(0) : score.keep_scale() / softmax[i].sum;
    const int row = first_q + Tile::row(i);
    if (cta.panel == 0 && Tile::first_col() == 0 && row < q_seq.length)
      static_cast<Real*>(p.lse.data)[p.lse.offset(q_seq, head) + row] = softmax[i].lse();
  }
  store_rows<kPanel, Real>(static_cast<Element*>(p.out.data) + p.out.offset(q_seq, head),
                           p.out.row_stride, q_seq.length, p.head_dim_v, first_q, first_col,
                           [&](int i, int j) { return acc_o[i][j] * inverse[i]; });
}

template <DType kDType, int kPanel, Variant kVariant>
void launch_forward(const ForwardParams& p, void* stream) {
  using Traits = ForwardTraits<kDType, kPanel, kVariant>;
  const int panels = int(ceil_div(p.head_dim_v > 0 ? p.head_dim_v : 1, kPanel));
  const int blocks = int(ceil_div(p.q_layout.max, Traits::kRows));
  const CtaGrid grid = CtaGrid::of(p, panels, blocks, p.num_heads, CtaGrid::Longest::kLastRows);
  launch(forward_kernel<Traits>, grid.ctas(), Traits::Tile::kThreads,
         sizeof(typename Traits::SharedStorage), stream, p, grid);
}

}  // namespace flash::cuda::simt
