// SPDX-License-Identifier: BSD-3-Clause
// FlashAttention-2, Algorithm 2, on mma.sync: one CTA computes kBlockN rows of dK and dV of one
// (sequence, kv head) and adds to the dQ of every query row that attends them.
//
// Grid: key blocks fastest, ascending (under a causal mask the longest first), then kv heads, then
// the batch; where dK and dV do not fit in the registers together (head_dim > 128), a CTA computes
// one of them. The CTA loops over the query heads of its kv head, so their sum stays in fp32.
// Warps: each owns kBlockN / kNumWarps keys. Scores are computed transposed, so P^T and dS^T of a
// warp are, in its registers, the left operands of its own rows of dV and dK. Only dS crosses
// warps, through shared memory. Per block of kBlockM queries:
//
//     S^T = K Q^T,   P^T = exp(S^T - lse),   dV += P^T dO
//     dP^T = V dO^T, dS^T = P^T o (dP^T - delta)
//     barrier,       dK += dS^T Q,   dQ = dS K: added to fp32 sums in the workspace
//
// dS is formed from the rounded P: fp32 weights would have to outlive dP in registers.
// Shared memory: K, V (kBlockN x d); Q, dO (kBlockM x d), lse and delta, twice: one is loaded while
// the other is in use; dS^T (kBlockN x kBlockM). At the end dK and dV take the place of K and V.
#pragma once

#include "cuda/common/backward_convert.cuh"
#include "cuda/launch.cuh"
#include "cuda/sm80/backward_scores.cuh"
#include "cuda/tile_config.h"
#include "primitives/ptx/red_add.cuh"
#include "primitives/tile/gemm.cuh"

namespace flash::cuda::sm80 {

template <DType kDType, int kHeadDim_, Variant kVariant_>
struct BackwardTraits {
  using Element = cuda::Element<kDType>;
  static constexpr Variant kVariant = kVariant_;
  static constexpr TileConfig kTiles = sm80_backward_tiles(kHeadDim_, kVariant);
  static constexpr int kHeadDim = kHeadDim_, kBlockM = kTiles.block_m, kBlockN = kTiles.block_n;
  static constexpr int kNumThreads = 32 * kTiles.num_warps;
  static constexpr int kRowsPerWarp = kBlockN / kTiles.num_warps;
  static constexpr int kParts = kHeadDim > 128 ? 2 : 1;  ///< CTAs per key block: dV, dK or both
  static_assert(kTiles.num_stages == 2, "Q and dO are loaded one block ahead");
  static_assert(kRowsPerWarp % 16 == 0, "a warp owns whole m16n8 tiles");
  static_assert(kBlockM <= kNumThreads, "one thread loads lse and delta of a query row");

  using KeyTile = SharedTile<Element, kBlockN, kHeadDim>;
  using QueryTile = SharedTile<Element, kBlockM, kHeadDim>;
  using ScoreTile = SharedTile<Element, kBlockN, kBlockM>;
  static constexpr int kDqWarpsM = kBlockM / (kHeadDim % 64 == 0 ? 32 : 16);
  using Dq = DqTile<kBlockM, kHeadDim, kTiles.num_warps, kDqWarpsM>;

  struct SharedStorage {
    alignas(128) Element k[kBlockN * kHeadDim];
    alignas(128) Element v[kBlockN * kHeadDim];
    alignas(128) Element q[2][kBlockM * kHeadDim];
    alignas(128) Element dout[2][kBlockM * kHeadDim];
    alignas(128) Element ds[kBlockN * kBlockM];
    QueryRow rows[2][kBlockM];
  };
};

/// The query side of a CTA's work: the rows of one query head, copied into stage m_block % 2.
template <class Traits>
struct QueryLoads {
  using Element = typename Traits::Element;
  using Tile = typename Traits::QueryTile;
  static constexpr float kSmallLse = 1024.f;

  typename Traits::SharedStorage& shared;
  GlobalMatrix<const Element> gQ, gdO;
  const float *lse, *delta;
  QueryRow row;  ///< of this thread, on its way from global to shared memory

  FLASH_DEVICE void load(int m_block) {
    const int stage = m_block % 2, m_begin = m_block * Traits::kBlockM;
    const auto all = [](int) { return true; };
    load_tile<Traits::kNumThreads>(Tile(shared.q[stage]), gQ, m_begin, all);
    load_tile<Traits::kNumThreads>(Tile(shared.dout[stage]), gdO, m_begin, all);
    cp_async_commit();
    const int q = m_begin + int(threadIdx.x);
    row = {INFINITY, 0.f};
    if (threadIdx.x < Traits::kBlockM && q < gQ.rows && !isinf(lse[q])) row = {lse[q], delta[q]};
  }
  /// A barrier after which the block is in shared memory; whether every |lse| is small.
  FLASH_DEVICE bool finish(int m_block) const {
    if (threadIdx.x < Traits::kBlockM) shared.rows[m_block % 2][threadIdx.x] = row;
    cp_async_wait<0>();
    return __syncthreads_and(isinf(row.lse) || fabsf(row.lse) < kSmallLse);
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kNumThreads)
    backward_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ RowView delta,
                    float* dq_sums, int* dq_turns, int n_blocks) {
  using Element = typename Traits::Element;
  using Dq = typename Traits::Dq;
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN, kHeadDim = Traits::kHeadDim;
  constexpr int kNumThreads = Traits::kNumThreads, kRows = Traits::kRowsPerWarp;
  constexpr int kParts = Traits::kParts;
  constexpr bool kGeneral = Traits::kVariant == Variant::kGeneral;
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_bytes);

  const bool is_dv_part = blockIdx.x % kParts == 0, is_dk_part = blockIdx.x % kParts == kParts - 1;
  const CtaPlace cta = CtaPlace::of(blockIdx.x / kParts, /*panels=*/1, n_blocks, p.num_heads_k);
  const int n_block = n_blocks - 1 - cta.block, n_begin = n_block * kBlockN;
  const Sequence q_sequence = Sequence::of(p.q_layout, cta.batch);
  const Sequence k_sequence = Sequence::of(p.k_layout, cta.batch);
  if (n_begin >= k_sequence.length) return;

  const auto gK = matrix_of<const Element>(p.k, k_sequence, cta.head, p.head_dim);
  const auto gV = matrix_of<const Element>(p.v, k_sequence, cta.head, p.head_dim_v);
  const typename Traits::KeyTile sK(shared.k), sV(shared.v);
  const typename Traits::ScoreTile sdS(shared.ds);

  // The mask as the keys see it: its rows are keys, its columns queries.
  const IntervalMask mask = p.mask_of(q_sequence, k_sequence), by_key = mask.transposed();
  const BlockRanges blocks = mask.query_blocks<kBlockM, kBlockN>(n_block);
  const bool is_ragged = n_begin + kBlockN > k_sequence.length;  // has keys to mask in every block
  const int diagonal_offset = p.mask.diagonal_offset(q_sequence.length, k_sequence.length);
  const DqTiles dq_tiles = DqTiles::of(p, kBlockM);

  const int warp_row = threadIdx.x / 32 * kRows;
  RegisterTile<kRows, kHeadDim> accumulators[kParts == 1 ? 2 : 1];
  auto &accdV = accumulators[0], &accdK = accumulators[kParts == 1 ? 1 : 0];
  accdV.clear();
  accdK.clear();

  const int first_head = cta.head * p.gqa_ratio();
  for (int head = first_head; head < first_head + p.gqa_ratio(); ++head) {
    const Scores<Element, Traits::kVariant> scores(p, cta.batch, head, diagonal_offset);
    const AttendedKeys<Element, Traits::kVariant> keys{p.features.score_mod, cta.batch, head};
    const int64_t dq_tile = dq_tiles.first(p.q_layout, q_sequence, cta.batch, head);
    QueryLoads<Traits> queries{
        .shared = shared,
        .gQ = matrix_of<const Element>(p.q, q_sequence, head, p.head_dim),
        .gdO = matrix_of<const Element>(p.dout, q_sequence, head, p.head_dim_v),
        .lse = static_cast<const float*>(p.lse.data) + p.lse.offset(q_sequence, head),
        .delta = static_cast<const float*>(delta.data) + delta.offset(q_sequence, head)};

    const auto step = [&](int m_block, bool needs_mask) {
      const int m_begin = m_block * kBlockM, row = n_begin + warp_row;
      const bool is_small = queries.finish(m_block);  // Q, dO, lse, delta are here; dS is used up
      if (m_block + 1 < blocks.visit.end) queries.load(m_block + 1);
      const typename Traits::QueryTile sQ(shared.q[m_block % 2]), sdO(shared.dout[m_block % 2]);
      const QueryRow* const rows = shared.rows[m_block % 2];

      RegisterTile<kRows, kBlockM> accS, accdP, slopes;
      accS.clear();
      gemm<kHeadDim>(accS, a_of(sK, warp_row), b_transposed_of(sQ));  // S^T = K Q^T
      if constexpr (kGeneral)
        for_each(accS, slopes, row, m_begin, [&](float& s, float& slope, int k, int q) {
          const ModifiedScore<float> score = scores.of(s, q, k);
          s = score.score;
          slope = score.slope;
        });
      if (needs_mask)
        fill_outside(accS, row, m_begin, -INFINITY,
                     [&](int k) { return Range{by_key.key_begin(k), by_key.key_end(k)}; });
      auto rP = is_small ? weights_of<Element, true>(accS, scores.unit, rows)
                         : weights_of<Element, false>(accS, scores.unit, rows);  // P^T
      if constexpr (kGeneral)
        if (scores.has_dropout()) scores.mark_dropped(rP, row, m_begin);

      if (is_dv_part) {  // dV += P^T dO
        if constexpr (kGeneral)
          gemm<kBlockM>(accdV, KeptWeights<decltype(rP)>{rP}, b_of(sdO));
        else
          gemm<kBlockM>(accdV, rP, b_of(sdO));
      }
      if (!is_dk_part) return;
      accdP.clear();
      gemm<kHeadDim>(accdP, a_of(sV, warp_row), b_transposed_of(sdO));  // dP^T = V dO^T
      to_score_gradient(accdP, rP, slopes, scores, rows);
      const auto rdS = to_operand<Element>(accdP);
      store_operand(rdS, sdS, warp_row, 0);
      __syncthreads();                      // dS is complete
      gemm<kBlockM>(accdK, rdS, b_of(sQ));  // dK += dS^T Q
      if (!p.dq.data) return;

      typename Dq::Accumulator accdQ;
      accdQ.clear();
      gemm<kBlockN>(accdQ, a_transposed_of(sdS, 0, Dq::first_row()),
                    b_of<Dq::kWarpsCols>(sK, 0, Dq::first_col()));  // dQ = dS K
      int* const turns = dq_turns + dq_tile + m_block;
      if (p.deterministic)
        wait_for_turn(turns, n_block - mask.key_blocks<kBlockM, kBlockN>(m_block).visit.begin);
      Dq::for_each_quad(dq_sums + (dq_tile + m_block) * Dq::kElements, accdQ, red_add_quad);
      if (p.deterministic) end_turn(turns);
    };

    if (blocks.visit.begin == blocks.visit.end) break;
    __syncthreads();  // the tiles of the head before are used up
    if (kGeneral || head == first_head) {
      load_tile<kNumThreads>(sK, gK, n_begin, keys);
      load_tile<kNumThreads>(sV, gV, n_begin, keys);
    }
    queries.load(blocks.visit.begin);
    for (int m = blocks.visit.begin; m < blocks.visit.end; ++m)
      step(m, /*needs_mask=*/is_ragged || m < blocks.full.begin || m >= blocks.full.end);
  }

  __syncthreads();  // K and V are used up: dK and dV take their places
  if constexpr (kGeneral)
    if (is_dv_part && p.features.dropout.enabled()) accdV.multiply(float(p.features.dropout.scale));
  if (is_dk_part) accdK.multiply(float(p.softmax_scale));
  if (is_dv_part) round_to_tile(accdV, sV, warp_row, 0);
  if (is_dk_part) round_to_tile(accdK, sK, warp_row, 0);
  __syncthreads();
  if (is_dv_part && p.dv.data)
    store_tile<kNumThreads>(sV, matrix_of<Element>(p.dv, k_sequence, cta.head, p.head_dim_v),
                            n_begin);
  if (is_dk_part && p.dk.data)
    store_tile<kNumThreads>(sK, matrix_of<Element>(p.dk, k_sequence, cta.head, p.head_dim),
                            n_begin);
}

template <DType kDType, int kHeadDim, Variant kVariant>
void launch_backward(const BackwardParams& p, const RowView& delta, void* scratch, void* stream) {
  using Traits = BackwardTraits<kDType, kHeadDim, kVariant>;
  using Dq = typename Traits::Dq;
  auto* const dq_sums = static_cast<float*>(scratch);
  const int64_t tiles = DqTiles::of(p, Traits::kBlockM).count(p.num_heads);
  auto* const dq_turns = reinterpret_cast<int*>(dq_sums + tiles * Dq::kElements);
  if (p.dq.data)
    FLASH_CUDA_CHECK(cudaMemsetAsync(scratch, 0, tiles * dq_tile_bytes(kHeadDim, Traits::kBlockM),
                                     static_cast<cudaStream_t>(stream)));
  const int n_blocks = int(ceil_div(p.k_layout.max, Traits::kBlockN));
  launch(backward_kernel<Traits>, int64_t(n_blocks) * p.num_heads_k * p.batch * Traits::kParts,
         Traits::kNumThreads, sizeof(typename Traits::SharedStorage), stream, p, delta, dq_sums,
         dq_turns, n_blocks);
  if (!p.dq.data) return;
  const int m_blocks = int(ceil_div(p.q_layout.max, Traits::kBlockM));
  launch(convert_dq_kernel<typename Traits::Element, Dq>, int64_t(m_blocks) * p.num_heads * p.batch,
         Traits::kNumThreads, 0, stream, p, dq_sums, m_blocks);
}

}  // namespace flash::cuda::sm80
