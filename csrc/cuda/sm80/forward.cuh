// SPDX-License-Identifier: BSD-3-Clause
// FlashAttention-2, Algorithm 1, on mma.sync: one CTA computes kBlockM rows of O of one (sequence,
// head).
//
// Grid: row blocks fastest, the last (under a causal mask the longest) first; then heads, so that
// the query heads of a kv head run side by side and share its K and V in L2; then the batch.
// Warps: each owns kBlockM / kNumWarps rows of S and O, so the softmax crosses no warp.
// Shared memory: Q (kBlockM x d; at the end O), K (kBlockN x d), V (kBlockN x d), swizzled.
// Copies: one buffer for K and one for V, each filled while the other is in use:
//
//     copy     K0 | V0      | K1           | V1      | ...
//     compute     | S = QK0 | softmax, PV0 | S = QK1 | ...
//
// Two CTAs share a multiprocessor, and the softmax of one runs beside the products of the other.
#pragma once

#include "cuda/common/global_matrix.cuh"
#include "cuda/common/pair_score.cuh"
#include "cuda/launch.cuh"
#include "cuda/sm80/scores.cuh"
#include "cuda/sm80/shared_bytes.h"
#include "cuda/sm80/softmax.cuh"
#include "cuda/tile_config.h"
#include "primitives/tile/copy.cuh"
#include "primitives/tile/gemm.cuh"

namespace flash::cuda::sm80 {

template <DType kDType, int kHeadDim_, Variant kVariant_>
struct ForwardTraits {
  using Element = cuda::Element<kDType>;
  static constexpr Variant kVariant = kVariant_;
  static constexpr TileConfig kTiles = sm80_forward_tiles(kHeadDim_, kVariant);
  static constexpr int kHeadDim = kHeadDim_, kBlockM = kTiles.block_m, kBlockN = kTiles.block_n;
  static constexpr int kNumThreads = 32 * kTiles.num_warps;
  static constexpr int kRowsPerWarp = kBlockM / kTiles.num_warps;
  static_assert(kRowsPerWarp % 16 == 0, "a warp owns whole m16n8 tiles");
  static_assert(kBlockN % 32 == 0, "blocks of dropout bits span 32 keys");

  using QueryTile = SharedTile<Element, kBlockM, kHeadDim>;
  using KeyTile = SharedTile<Element, kBlockN, kHeadDim>;
  struct SharedStorage {
    alignas(128) Element q[kBlockM * kHeadDim];
    alignas(128) Element k[kBlockN * kHeadDim];
    alignas(128) Element v[kBlockN * kHeadDim];
  };
  static_assert(sizeof(SharedStorage) == forward_shared_bytes(kHeadDim, kVariant),
                "the host asks the device for this much");
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kNumThreads)
    forward_kernel(const __grid_constant__ ForwardParams p, int m_blocks) {
  using Element = typename Traits::Element;
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN, kHeadDim = Traits::kHeadDim;
  constexpr int kNumThreads = Traits::kNumThreads, kRows = Traits::kRowsPerWarp;
  constexpr bool kGeneral = Traits::kVariant == Variant::kGeneral;
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_bytes);

  const CtaPlace cta = CtaPlace::of(blockIdx.x, {1, m_blocks, p.num_heads, p.batch});
  const Sequence q_sequence = Sequence::of(p.q_layout, cta.batch);
  const Sequence k_sequence = Sequence::of(p.k_layout, cta.batch);
  const int m_begin = cta.block * kBlockM;
  if (m_begin >= q_sequence.length) return;

  const int head = cta.head, head_k = head / p.gqa_ratio();
  const auto gQ = matrix_of<const Element>(p.q, q_sequence, head, p.head_dim);
  const auto gK = matrix_of<const Element>(p.k, k_sequence, head_k, p.head_dim);
  const auto gV = matrix_of<const Element>(p.v, k_sequence, head_k, p.head_dim_v);
  const auto gO = matrix_of<Element>(p.out, q_sequence, head, p.head_dim_v);
  const typename Traits::QueryTile sQ(shared.q), sO(shared.q);
  const typename Traits::KeyTile sK(shared.k), sV(shared.v);

  const IntervalMask mask = p.mask_of(q_sequence, k_sequence);
  const BlockRanges blocks = mask.key_blocks<kBlockM, kBlockN>(cta.block);
  const Scores<Element, Traits::kVariant> scores(p, cta.batch, head, mask);
  const AttendedKeys<Element, Traits::kVariant> keys{p.features.score_mod, cta.batch, head};

  const int warp_row = threadIdx.x / 32 * kRows;
  RegisterTile<kRows, kHeadDim> accO;
  accO.clear();
  OnlineSoftmax<kRows> softmax(scores.unit);

  const auto load_k = [&](int n_block) {
    load_tile<kNumThreads>(sK, gK, n_block * kBlockN, keys);
    cp_async_commit();
  };
  const auto load_v = [&](int n_block) {
    load_tile<kNumThreads>(sV, gV, n_block * kBlockN, keys);
    cp_async_commit();
  };
  const auto all_loaded_and_read = [] {
    cp_async_wait<0>();
    __syncthreads();
  };
  const auto step = [&](int n_block, bool needs_mask) {
    RegisterTile<kRows, kBlockN> accS;
    accS.clear();
    all_loaded_and_read();  // K is here, the V before is used up
    load_v(n_block);
    gemm<kHeadDim>(accS, a_of(sQ, warp_row), b_transposed_of(sK));  // S = Q K^T
    all_loaded_and_read();                                          // V is here, K is used up
    if (n_block > blocks.visit.begin) load_k(n_block - 1);

    const int row = m_begin + warp_row, col = n_block * kBlockN;
    if constexpr (kGeneral)
      scores.template modify<BlockRows::kQueries>(accS, row, col, [](int, int, auto&) {});
    if (needs_mask)
      for_each(accS, row, col, [&](float& s, int q, int k) {
        if (!mask.keep(q, k)) s = -INFINITY;
      });
    softmax.update(accS, accO);
    if constexpr (kGeneral)
      if (scores.has_dropout()) scores.drop(accS, row, col);
    gemm<kBlockN>(accO, to_operand<Element>(accS), b_of(sV));  // O += P V
  };

  if (blocks.visit.begin < blocks.visit.end) {
    load_tile<kNumThreads>(sQ, gQ, m_begin, [](int) { return true; });
    load_k(blocks.visit.end - 1);
  }
  for (int n = blocks.visit.end - 1; n >= blocks.visit.begin; --n)
    step(n, /*needs_mask=*/n < blocks.full.begin || n >= blocks.full.end);

  float scale_out = 1.f;
  if constexpr (kGeneral) {
    if (scores.has_sink()) softmax.add_sink(scores.sink(), accO);
    scale_out = scores.dropout_scale();
  }
  float* const lse = static_cast<float*>(p.lse.data) + p.lse.offset(q_sequence, head);
  softmax.finish(accO, scale_out, m_begin + warp_row, [&](int q, float row_lse) {
    if (q < q_sequence.length) lse[q] = row_lse;
  });
  __syncthreads();  // Q is used up: O takes its place
  round_to_tile(accO, sO, warp_row, 0);
  __syncthreads();
  store_tile<kNumThreads>(sO, gO, m_begin);
}

template <DType kDType, int kHeadDim, Variant kVariant>
void launch_forward(const ForwardParams& p, void* stream) {
  using Traits = ForwardTraits<kDType, kHeadDim, kVariant>;
  const int m_blocks = int(ceil_div(p.q_layout.max, Traits::kBlockM));
  launch(forward_kernel<Traits>, int64_t(m_blocks) * p.num_heads * p.batch, Traits::kNumThreads,
         sizeof(typename Traits::SharedStorage), stream, p, m_blocks);
}

}  // namespace flash::cuda::sm80
