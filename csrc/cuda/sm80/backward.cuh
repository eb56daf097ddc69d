// SPDX-License-Identifier: BSD-3-Clause
// FlashAttention-2, Algorithm 2, on mma.sync: one CTA computes kBlockN rows of dK and dV of one
// (sequence, kv head) and adds to the dQ of every query row that attends them.
//
// Grid: key blocks fastest, ascending (under a causal mask the longest first; descending where dQ
// is summed in order), then kv heads, then the batch; where dK and dV do not fit in the registers
// together (head_dim > 128), a CTA computes one of them. The CTA loops over the query heads of its
// kv head, so their sum stays in fp32.
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
#include "cuda/sm80/shared_bytes.h"
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
  static_assert(sizeof(SharedStorage) == backward_shared_bytes(kHeadDim, kVariant),
                "the host asks the device for this much");
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

/// Which query blocks a key block meets, and when it is its turn to add to their dQ in
/// deterministic mode: the last key block comes first. Under a causal mask that is the one that
/// starts at the query block, so nobody waits; and CTAs of later key blocks have smaller indices in
/// this mode, so whoever is waited for has been started.
template <int kBlockM, int kBlockN>
struct QueryVisits {
  const IntervalMask& mask;
  int n_block;
  bool in_order;

  /// Below a negative window, rows and columns may disagree on which blocks meet. There, all do.
  FLASH_DEVICE bool meets_all() const { return in_order && mask.lower > mask.upper; }
  FLASH_DEVICE BlockRanges blocks() const {
    if (meets_all()) return {{0, (mask.seqlen_q + kBlockM - 1) / kBlockM}, {0, 0}};
    return mask.template query_blocks<kBlockM, kBlockN>(n_block);
  }
  FLASH_DEVICE int turn(int m_block) const {
    if (meets_all()) return (mask.seqlen_k - 1) / kBlockN - n_block;
    return mask.template key_blocks<kBlockM, kBlockN>(m_block).visit.end - 1 - n_block;
  }
};

/// The dQ of one query head, which the CTAs of all key blocks add to, taking turns or not.
template <class Traits>
struct QueryGradients {
  using Dq = typename Traits::Dq;

  float* sums;
  int* turns;           ///< a counter per query block; null: the order is free
  int* held = nullptr;  ///< the turn that this CTA has not passed on yet

  template <class Visits>
  FLASH_DEVICE void add(int m_block, const Visits& visits, typename Dq::Accumulator& accdQ) {
    if (turns) wait_for_turn(held = turns + m_block, visits.turn(m_block));
    Dq::for_each_quad(sums + m_block * int64_t(Dq::kElements), accdQ, red_add_quad);
  }
  /// A barrier of the CTA. It also passes the turn on, whose additions have had time to arrive.
  FLASH_DEVICE void barrier() {
    if (held) __threadfence();
    __syncthreads();
    if (held && threadIdx.x == 0) pass_turn(held);
    held = nullptr;
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
  const CtaPlace cta = CtaPlace::of(blockIdx.x / kParts, {1, n_blocks, p.num_heads_k, p.batch});
  const bool in_order = p.deterministic && p.dq.data;
  const int n_block = in_order ? cta.block : n_blocks - 1 - cta.block, n_begin = n_block * kBlockN;
  const Sequence q_sequence = Sequence::of(p.q_layout, cta.batch);
  const Sequence k_sequence = Sequence::of(p.k_layout, cta.batch);
  if (n_begin >= k_sequence.length) return;

  const auto gK = matrix_of<const Element>(p.k, k_sequence, cta.head, p.head_dim);
  const auto gV = matrix_of<const Element>(p.v, k_sequence, cta.head, p.head_dim_v);
  const typename Traits::KeyTile sK(shared.k), sV(shared.v);
  const typename Traits::ScoreTile sdS(shared.ds);

  // The mask as the keys see it: its rows are keys, its columns queries.
  const IntervalMask mask = p.mask_of(q_sequence, k_sequence), by_key = mask.transposed();
  const QueryVisits<kBlockM, kBlockN> visits{mask, n_block, in_order};
  const BlockRanges blocks = visits.blocks();
  const bool is_ragged = n_begin + kBlockN > k_sequence.length;  // has keys to mask in every block
  const DqTiles dq_tiles = DqTiles::of(p, kBlockM);

  const int warp_row = threadIdx.x / 32 * kRows;
  RegisterTile<kRows, kHeadDim> accumulators[kParts == 1 ? 2 : 1];
  auto &accdV = accumulators[0], &accdK = accumulators[kParts == 1 ? 1 : 0];
  accdV.clear();
  accdK.clear();

  const int first_head = cta.head * p.gqa_ratio();
  for (int head = first_head; head < first_head + p.gqa_ratio(); ++head) {
    const Scores<Element, Traits::kVariant> scores(p, cta.batch, head, mask);
    const AttendedKeys<Element, Traits::kVariant> keys{p.features.score_mod, cta.batch, head};
    const int64_t dq_tile = dq_tiles.first(p.q_layout, q_sequence, cta.batch, head);
    QueryLoads<Traits> queries{
        .shared = shared,
        .gQ = matrix_of<const Element>(p.q, q_sequence, head, p.head_dim),
        .gdO = matrix_of<const Element>(p.dout, q_sequence, head, p.head_dim_v),
        .lse = static_cast<const float*>(p.lse.data) + p.lse.offset(q_sequence, head),
        .delta = static_cast<const float*>(delta.data) + delta.offset(q_sequence, head)};
    QueryGradients<Traits> gradients{.sums = dq_sums + dq_tile * Dq::kElements,
                                     .turns = in_order ? dq_turns + dq_tile : nullptr};

    const auto step = [&](int m_block, bool needs_mask) {
      const int m_begin = m_block * kBlockM, row = n_begin + warp_row;
      const bool is_small = queries.finish(m_block);  // Q, dO, lse, delta are here; dS is used up
      if (m_block + 1 < blocks.visit.end) queries.load(m_block + 1);
      const typename Traits::QueryTile sQ(shared.q[m_block % 2]), sdO(shared.dout[m_block % 2]);
      const QueryRow* const rows = shared.rows[m_block % 2];

      RegisterTile<kRows, kBlockM> accS, accdP, slopes;
      accS.clear();
      gemm<kHeadDim>(accS, a_of(sK, warp_row), b_transposed_of(sQ));  // S^T = K Q^T
      modify_scores(accS, slopes, scores, row, m_begin);
      if (needs_mask)
        fill_outside(accS, row, m_begin, -INFINITY, [&](int k) {
          const bool exists = k < k_sequence.length;
          return Range{by_key.key_begin(k), exists ? by_key.key_end(k) : 0};
        });
      const auto rP = weights_of(accS, scores, rows, is_small, row, m_begin);
      if (is_dv_part) gemm<kBlockM>(accdV, kept<Traits::kVariant>(rP), b_of(sdO));  // dV += P^T dO
      if (!is_dk_part) return;
      accdP.clear();
      gemm<kHeadDim>(accdP, a_of(sV, warp_row), b_transposed_of(sdO));  // dP^T = V dO^T
      to_score_gradient(accdP, rP, slopes, scores, rows);
      const auto rdS = to_operand<Element>(accdP);
      store_operand(rdS, sdS, warp_row, 0);
      gradients.barrier();                  // dS is complete
      gemm<kBlockM>(accdK, rdS, b_of(sQ));  // dK += dS^T Q
      if (!p.dq.data) return;

      typename Dq::Accumulator accdQ;
      accdQ.clear();
      gemm<kBlockN>(accdQ, a_transposed_of(sdS, 0, Dq::first_row()),
                    b_of<Dq::kWarpsCols>(sK, 0, Dq::first_col()));  // dQ = dS K
      gradients.add(m_block, visits, accdQ);
    };

    if (blocks.visit.begin == blocks.visit.end) break;
    if (kGeneral || head == first_head) {
      load_tile<kNumThreads>(sK, gK, n_begin, keys);
      load_tile<kNumThreads>(sV, gV, n_begin, keys);
    }
    queries.load(blocks.visit.begin);
    for (int m = blocks.visit.begin; m < blocks.visit.end; ++m)
      step(m, /*needs_mask=*/is_ragged || m < blocks.full.begin || m >= blocks.full.end);
    gradients.barrier();  // all tiles are used up: by those of the next head, or by dK and dV
  }

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
