// SPDX-License-Identifier: BSD-3-Clause
// dV = P^T dO and dK = scale dS^T Q on CUDA cores: any head dim, any dtype, deterministic.
//
// One CTA computes a panel of kPanel columns of dK and of dV for kRows keys of one (sequence, KV
// head). Rows of its tiles are keys, columns are queries; the mask is the transposed one, so that
// the loop bounds and the element test are the forward's. Over the query heads of the group and
// their blocks of kCols queries, in this order:
//
//   S^T = K Q^T, P^T = exp(S^T - lse)
//   dV += P^T dO                           P^T by the exchange, read by the warp that wrote it
//   dP^T = V dO^T, dS^T = P^T o (dP^T - delta)
//   dK += dS^T Q
//
// The sums of a whole group stay in registers: one rounding, no atomics.
#pragma once

#include "cuda/common/backward_bias.cuh"
#include "cuda/simt/backward_q.cuh"

namespace flash::cuda::simt {

template <class Traits, class Params>
__global__ void __launch_bounds__(Traits::Tile::kThreads, Traits::kMinCtas)
    backward_kv_kernel(const __grid_constant__ Params p, const RowView delta, int panels,
                       int blocks) {
  using Tile = typename Traits::Tile;
  using Real = typename Traits::Real;
  using Element = typename Traits::Element;
  using Score = PairScore<Element, Traits::kVariant>;
  using Keys = AttendedKeys<Element, Traits::kVariant>;
  using Scores = typename Tile::template Registers<Traits::kCols>;
  constexpr int kCols = Traits::kCols, kPanel = Traits::kPanel, kVec = Tile::kVec;
  constexpr bool kGiven = kGradientIsGiven<Params>;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_bytes);

  const CtaPlace cta = CtaPlace::of(blockIdx.x, panels, blocks, p.num_heads_k);
  const Sequence q_seq = Sequence::of(p.q_layout, cta.batch);
  const Sequence k_seq = Sequence::of(p.k_layout, cta.batch);
  const int first_k = cta.block * Traits::kRows, first_col = cta.panel * kPanel;
  if (first_k >= k_seq.length) return;

  const IntervalMask mask = p.mask_of(q_seq, k_seq).transposed();
  const BlockRanges range = mask.key_blocks<Traits::kRows, kCols>(cta.block);
  typename Tile::template Registers<kPanel> acc_dk = {}, acc_dv = {};
  int stage = 0;
#pragma unroll 1
  for (int in_group = 0; in_group < p.gqa_ratio(); ++in_group) {
    const int head = cta.head * p.gqa_ratio() + in_group;
    const Score score(p, cta.batch, head, q_seq, k_seq);
    const Keys keys{p.features.score_mod, cta.batch, head};
    const MatrixRows<Real, Element> q(p.q.data, p.q.offset(q_seq, head), p.q.row_stride,
                                      q_seq.length, p.head_dim);
    const MatrixRows<Real, Element, Keys> k(p.k.data, p.k.offset(k_seq, cta.head),
                                            p.k.row_stride, k_seq.length, p.head_dim, keys);
#pragma unroll 1
    for (int m = range.visit.begin; m < range.visit.end; ++m) {
      const int first_q = m * kCols;
      const bool needs_mask = m < range.full.begin || m >= range.full.end;
      if (threadIdx.x < kCols) {
        shared.lse[threadIdx.x] = lse_of<Real>(p.lse, q_seq, head, first_q + threadIdx.x);
        shared.delta[threadIdx.x] = delta_of<Real>(delta, q_seq, head, first_q + threadIdx.x);
      }
      __syncthreads();
      Scores weight = {}, slope, ds = {};
      product_abt<kCols>(weight, shared.stages, stage, k, first_k, q, first_q, p.head_dim);
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const int row = first_k + Tile::row(i), col = first_q + Tile::col(j);
          weight[i][j] =
              score.signed_weight(weight[i][j], col, row, !needs_mask || mask.keep(row, col),
                                  shared.lse[Tile::col(j)], slope[i][j]);
        }
      if constexpr (!kGiven) {
        const MatrixRows<Real, Element> dout(p.dout.data, p.dout.offset(q_seq, head),
                                             p.dout.row_stride, q_seq.length, p.head_dim_v);
        if (p.dv.data) {
          shared.exchange.write(
              [&](int i, int j) { return score.after_dropout(weight[i][j]); });
          product_ab<kPanel>(acc_dv, shared.exchange, shared.stages, stage, dout, first_q,
                             first_col);
        }
        if (!p.dk.data) continue;
        const MatrixRows<Real, Element, Keys> v(p.v.data, p.v.offset(k_seq, cta.head),
                                                p.v.row_stride, k_seq.length, p.head_dim_v, keys);
        product_abt<kCols>(ds, shared.stages, stage, v, first_k, dout, first_q, p.head_dim_v);
      }
      shared.exchange.write([&](int i, int j) {
        const int row = first_k + Tile::row(i), col = first_q + Tile::col(j);
        if constexpr (kGiven)
          ds[i][j] = given_gradient<Element>(p, {cta.batch, head, col, row});
        const Real gradient =
            score.gradient(weight[i][j], ds[i][j], shared.delta[Tile::col(j)]);
        return score.backward(gradient, slope[i][j]);
      });
      product_ab<kPanel>(acc_dk, shared.exchange, shared.stages, stage, q, first_q, first_col);
    }
  }

  const Real scale = Real(p.softmax_scale);
  if (p.dk.data)
    store_rows<kPanel, Real>(static_cast<Element*>(p.dk.data) + p.dk.offset(k_seq, cta.head),
                             p.dk.row_stride, k_seq.length, p.head_dim, first_k, first_col,
                             [&](int i, int j) { return acc_dk[i][j] * scale; });
  if constexpr (!kGiven) {
    if (p.dv.data)
      store_rows<kPanel, Real>(static_cast<Element*>(p.dv.data) + p.dv.offset(k_seq, cta.head),
                               p.dv.row_stride, k_seq.length, p.head_dim_v, first_k, first_col,
                               [&](int i, int j) { return acc_dv[i][j]; });
  }
}

template <DType kDType, int kPanel, Variant kVariant, class Params>
void launch_backward_kv(const Params& p, const RowView& delta, void* stream) {
  using Traits = BackwardTraits<kDType, kPanel, kVariant>;
  int width = 1;
  if (p.dk.data && p.head_dim > width) width = p.head_dim;
  if constexpr (!kGradientIsGiven<Params>) {
    if (p.dv.data && p.head_dim_v > width) width = p.head_dim_v;
  }
  const int panels = int(ceil_div(width, kPanel));
  const int blocks = int(ceil_div(p.k_layout.max, Traits::kRows));
  launch(backward_kv_kernel<Traits, Params>, int64_t(panels) * blocks * p.num_heads_k * p.batch,
         Traits::Tile::kThreads, sizeof(typename Traits::SharedStorage), stream, p, delta, panels,
         blocks);
}

template <DType kDType, int kPanel, Variant kVariant>
void launch_backward(const BackwardParams& p, const RowView& delta, void* stream) {
  if (p.dk.data || p.dv.data) launch_backward_kv<kDType, kPanel, kVariant>(p, delta, stream);
  if (p.dq.data) launch_backward_q<kDType, kPanel, kVariant>(p, delta, stream);
}

template <DType kDType>
void launch_weights_backward(const WeightsBackwardParams& p, void* stream) {
  constexpr int kPanel = 64;
  if (p.dk.data) launch_backward_kv<kDType, kPanel, Variant::kGeneral>(p, RowView{}, stream);
  if (p.dq.data || p.dlse.data)
    launch_backward_q<kDType, kPanel, Variant::kGeneral>(p, RowView{}, stream);
  if (p.dbias) launch_backward_bias<kDType>(p, RowView{}, stream);
}

}  // namespace flash::cuda::simt
