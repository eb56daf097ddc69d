// SPDX-License-Identifier: BSD-3-Clause
// FlashAttention-2, Algorithm 1, on CUDA cores: any head dim, any dtype.
//
// One CTA computes a panel of kPanel columns of O for kRows query rows of one (sequence, head);
// CTAs of further panels repeat the scores. Q stays in shared memory; of wide heads a slab of
// columns does, and slabs take turns, forwards for one block of keys and backwards for the next.
// Per block of kCols keys:
//
//   S = Q K^T       K streamed through shared memory in chunks of 16 columns of the head dim
//   m, l            a row's scores lie in 8 lanes of one warp: shuffles
//   E = P           to shared memory, transposed; read by the warp that wrote it
//   O += E V        V streamed in chunks of 16 keys
//
// The first chunk of V begins its way before the softmax, the next one of K in the last step of E
// V. Blocks that lie inside the mask skip its element test.
#pragma once

#include <algorithm>

#include "attention/softmax.h"
#include "cuda/common/pair_score.cuh"
#include "cuda/launch.cuh"
#include "cuda/tile_config.h"
#include "primitives/fma_product.cuh"

namespace flash::cuda::simt {

template <DType kDType, int kPanel_, Variant kVariant_>
struct ForwardTraits {
  static constexpr Variant kVariant = kVariant_;
  static constexpr SimtForwardTile kConfig = simt_forward_tile(kDType, kVariant);
  static constexpr int kCols = kConfig.cols, kPanel = kPanel_, kCtas = kConfig.ctas;
  using Element = cuda::Element<kDType>;
  using Real = Accumulator<Element>;
  using Tile = FmaTile<Real, kConfig.warps, kConfig.row_vectors>;
  static constexpr int kRows = Tile::kRows, kThreads = Tile::kThreads, kMaxResident = 256;
  static_assert(kRows == simt_rows(kDType), "the host counts row blocks by simt_rows");

  struct SharedStorage {
    FmaRing<Tile, (kCols > kPanel ? kCols : kPanel)> ring;
    FmaExchange<Tile, kCols> weights;
    /// Q^T. Allocated as far as it is used.
    FmaOperand<DenseLayout<Tile, kRows>, Real, kMaxResident> q;
  };
  static constexpr size_t shared_bytes(int resident) {
    return sizeof(SharedStorage) - sizeof(Real) * kRows * (kMaxResident - resident);
  }
};

/// Raw dot products -> what softmax_step takes, -inf where the pair is masked: the dot products
/// again or, with features, the scores. Features are evaluated in a loop over shared memory:
/// unrolled, they would fit neither the registers nor the instruction cache.
template <class Traits, class Real, class Score, int kScoreCols>
__device__ __forceinline__ void modify_scores(
    Real (&acc_s)[Traits::Tile::kThreadRows][kScoreCols],
    FmaExchange<typename Traits::Tile, Traits::kCols>& exchange, const Score& score,
    const IntervalMask& mask, int first_q, int first_k, bool needs_mask) {
  using Tile = typename Traits::Tile;
  if constexpr (Score::kGeneral) {
    exchange.write([&](int i, int j) { return acc_s[i][j]; });
    exchange.update_in_loop([&](int i, int j, Real dot) {
      const int q = first_q + Tile::row(i), k = first_k + Tile::col(j);
      // Features have no values for rows beyond the last query.
      if (q >= mask.seqlen_q || (needs_mask && !mask.keep(q, k))) return Real(-INFINITY);
      return score(dot, q, k).score;
    });
    exchange.read(acc_s);
  } else if (needs_mask) {
#pragma unroll
    for (int i = 0; i < Tile::kThreadRows; ++i) {
      const int q = first_q + Tile::row(i), k = first_k + Tile::first_col();
      const int begin = mask.key_begin(q) - k, end = mask.key_end(q) - k;
#pragma unroll
      for (int j = 0; j < kScoreCols; ++j) {
        const int offset = Tile::col(j) - Tile::first_col();
        if (offset < begin || offset >= end) acc_s[i][j] = Real(-INFINITY);
      }
    }
  }
}

/// S / scale -> P; O is rescaled. `softmax` is of the row that the thread keeps.
template <class Traits, class Real, int kScoreCols, int kOutCols>
__device__ __forceinline__ void softmax_step(Real (&acc_s)[Traits::Tile::kThreadRows][kScoreCols],
                                             Real (&acc_o)[Traits::Tile::kThreadRows][kOutCols],
                                             OnlineSoftmaxRow<Real>& softmax, Real scale) {
  using Tile = typename Traits::Tile;
  Real of_row[Tile::kThreadRows];
#pragma unroll
  for (int i = 0; i < Tile::kThreadRows; ++i) {
    of_row[i] = acc_s[i][0];
#pragma unroll
    for (int j = 1; j < kScoreCols; ++j) of_row[i] = fmax(of_row[i], acc_s[i][j]);
  }
  const auto larger = [](Real a, Real b) { return fmax(a, b); };
  const Real kept_factor = softmax.rescale(Tile::reduce_to_keeper(of_row, larger) * scale);
  // A row without a finite score yet: exp(-inf - 0) = 0, and a NaN stays one. An infinite maximum
  // makes NaN of the whole row.
  const Real kept_offset =
      softmax.max == Real(-INFINITY) ? Real(0) : softmax.max + Real(0) * softmax.max;
#pragma unroll
  for (int i = 0; i < Tile::kThreadRows; ++i) {
    const Real factor = Tile::from_keeper(kept_factor, i);
    const Real offset = Tile::from_keeper(kept_offset, i);
    of_row[i] = 0;
#pragma unroll
    for (int j = 0; j < kScoreCols; ++j) {
      acc_s[i][j] = exp_of(acc_s[i][j] * scale - offset);
      of_row[i] += acc_s[i][j];
    }
#pragma unroll
    for (int j = 0; j < kOutCols; ++j) acc_o[i][j] *= factor;
  }
  softmax.sum += Tile::reduce_to_keeper(of_row, [](Real a, Real b) { return a + b; });
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtas)
    forward_kernel(const __grid_constant__ ForwardParams p, const CtaGrid grid, int resident,
                   int slabs) {
  using Tile = typename Traits::Tile;
  using Real = typename Traits::Real;
  using Element = typename Traits::Element;
  using Score = PairScore<Element, Traits::kVariant>;
  using Keys = AttendedKeys<Element, Traits::kVariant>;
  constexpr int kCols = Traits::kCols, kPanel = Traits::kPanel;
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

  OnlineSoftmaxRow<Real> softmax;
  typename Tile::template Registers<kPanel> acc_o = {};
  int stage = 0;
  int slab = 0, loaded = -1, step = resident;  // first columns of slabs of Q
  const BlockRanges range = mask.key_blocks<Traits::kRows, kCols>(cta.block);
  TransposedChunk<Tile, decltype(k), kCols, decltype(k)::kUnconverted> k_chunk(
      k, range.visit.begin * kCols);
  k_chunk.begin(shared.ring.stages[stage], slab);
#pragma unroll 1
  for (int n = range.visit.begin; n < range.visit.end; ++n) {
    typename Tile::template Registers<kCols> acc_s = {};
#pragma unroll 1
    for (int left = slabs;;) {
      const int depth = max(min(resident, p.head_dim - slab), 1);
      if (slab != loaded) {
        __syncthreads();  // the slab before has been read
        load_transposed<Tile>(shared.q, q, first_q, slab, depth);
        loaded = slab;
      }
      product_abt<Tile>(acc_s, shared.q, shared.ring, stage, k_chunk, slab, depth);
      if (--left == 0) break;
      slab += step;
      k_chunk.begin(shared.ring.stages[stage], slab);
    }
    step = -step;  // the next block of keys begins with the slab that is here

    StraightChunk<Tile, decltype(v), kPanel, decltype(v)::kUnconverted> v_chunk(v, n * kCols,
                                                                                first_col);
    v_chunk.begin(shared.ring.stages[stage]);
    const bool needs_mask = n < range.full.begin || n >= range.full.end;
    modify_scores<Traits>(acc_s, shared.weights, score, mask, first_q, n * kCols, needs_mask);
    softmax_step<Traits>(acc_s, acc_o, softmax, Score::kGeneral ? Real(1) : score.scale);
    shared.weights.write([&](int i, int j) { return acc_s[i][j]; });
    if (score.drops())
      shared.weights.update_in_loop([&](int i, int j, Real weight) {
        return score.keeps(first_q + Tile::row(i), n * kCols + Tile::col(j)) ? weight : Real(0);
      });
    product_ab<Tile>(
        acc_o, shared.weights, shared.ring, stage, v_chunk, min(kCols, v.rows - n * kCols),
        [&](auto& next_stage) {
          k_chunk.seek((n + 1) * kCols);
          k_chunk.begin(next_stage, slab);
        },
        Unchanged());
  }
  k_chunk.finish(
      shared.ring.stages[stage]);  // of the block after the last: no copy outlives the CTA

  // exp(m - m with the sink) / l
  Real normalizer = 1;
  if constexpr (Score::kGeneral) {
    if (p.features.sink.enabled()) {
      const Real before = softmax.max;
      softmax.add_sink(p.features.sink.of<Real>(head));
      if (before != softmax.max) normalizer = exp_of(before - softmax.max);
    }
  }
  normalizer = softmax.sum == 0 ? Real(0) : normalizer * score.keep_scale() / softmax.sum;
  const int row = first_q + Tile::kept_row();
  if (cta.panel == 0 && Tile::is_first_keeper() && row < q_seq.length)
    static_cast<Real*>(p.lse.data)[p.lse.offset(q_seq, head) + row] = softmax.lse();
  Real normalizers[Tile::kThreadRows];
#pragma unroll
  for (int i = 0; i < Tile::kThreadRows; ++i) normalizers[i] = Tile::from_keeper(normalizer, i);
  store_rows<Tile, kPanel>(static_cast<Element*>(p.out.data) + p.out.offset(q_seq, head),
                           p.out.row_stride, q_seq.length, p.head_dim_v, first_q, first_col,
                           [&](int i, int j) {  // an empty row: 0 times a NaN of V is none
                             return normalizers[i] == 0 ? Real(0) : acc_o[i][j] * normalizers[i];
                           });
}

/// Columns of Q that shared memory holds at a time: as many as fit beside the rest with kCtas CTAs
/// on a multiprocessor, in slabs of equal width.
template <class Traits>
int resident_columns(int head_dim) {
  constexpr int kDepth = Traits::Tile::kDepth, kReservedBytes = 1024;  // of each CTA, by CUDA
  const int64_t bytes = std::min<int64_t>(
      shared_bytes_per_multiprocessor() / Traits::kCtas - kReservedBytes, max_shared_bytes());
  const int64_t room = (bytes - int64_t(Traits::shared_bytes(0))) /
                       int64_t(sizeof(typename Traits::Real) * Traits::kRows * kDepth);
  const int64_t fitting = std::clamp<int64_t>(room, 1, Traits::kMaxResident / kDepth);
  const int64_t steps = std::max<int64_t>(ceil_div(head_dim, kDepth), 1);
  return int(ceil_div(steps, ceil_div(steps, fitting))) * kDepth;
}

template <DType kDType, int kPanel, Variant kVariant>
void launch_forward(const ForwardParams& p, void* stream) {
  using Traits = ForwardTraits<kDType, kPanel, kVariant>;
  const int panels = int(ceil_div(p.head_dim_v > 0 ? p.head_dim_v : 1, kPanel));
  const int blocks = int(ceil_div(p.q_layout.max, Traits::kRows));
  const CtaGrid grid = CtaGrid::of(p, panels, blocks, p.num_heads, CtaGrid::Longest::kLastRows);
  const int resident = resident_columns<Traits>(p.head_dim);
  const int slabs = int(ceil_div(std::max(p.head_dim, 1), resident));
  launch(forward_kernel<Traits>, grid.ctas(), Traits::kThreads, Traits::shared_bytes(resident),
         stream, p, grid, resident, slabs);
}

}  // namespace flash::cuda::simt
