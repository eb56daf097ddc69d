// SPDX-License-Identifier: BSD-3-Clause
// What the general variant does between the products of a step: see backward_scores.cuh.
#pragma once

#include "cuda/sm90/backward_load.cuh"
#include "cuda/sm90/backward_mma.cuh"
#include "cuda/sm90/backward_scores.cuh"

namespace flash::cuda::sm90 {

/// The 64 keys of a warpgroup, rows of the scores, against the blocks of one query head. `ring` is
/// where the block stands: a step has one stage of dS, and its phase is that of the step.
template <class Traits>
struct GeneralStep {
  using Shared = typename Traits::SharedStorage;
  static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;

  const BackwardMaps& maps;
  Shared& shared;
  int warpgroup, warp;
  int head, n_block;
  BackwardScores<Traits, BlockRows::kKeys> scores;

  FLASH_DEVICE GeneralStep(const BackwardMaps& tensors, const BackwardParams& p, Shared& storage,
                           int warpgroup_index)
      : maps(tensors),
        shared(storage),
        warpgroup(warpgroup_index),
        warp(warp_uniform((threadIdx.x >> 5) & 3)),
        scores{p} {}

  FLASH_DEVICE int lane() const { return threadIdx.x & 31; }
  FLASH_DEVICE uint32_t ds_chunk() const {
    return shared_address(shared.ds[0]) + warpgroup * kBlockM * 128;
  }

  FLASH_DEVICE void begin_head(const BackwardTileId& tile, int query_head) {
    n_block = to_uniform(tile.n_block);
    scores.begin_head(tile.batch, query_head, tile.q, tile.k);
  }
  /// Zeroes own keys of K and V that nobody attends. dQ, which reads those of the other warpgroup,
  /// follows a barrier of both.
  FLASH_DEVICE void clean_keys() const {
    const AttendedKeys<typename Traits::Element, Variant::kGeneral> keys{
        scores.p.features.score_mod, scores.batch, scores.head};
    const int row = warpgroup * 64 + (threadIdx.x & 63), key = n_block * kBlockN + row;
    if (key < scores.seqlen_k && !keys(key))
      clear_row<kBlockN, Traits::kChunks>((threadIdx.x & 64) == 0 ? shared.k : shared.v, row);
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(static_cast<int>(NamedBarrier::kKeysClean) + warpgroup, 128);
  }

  /// K Q^T becomes scores. Slopes wait where dS will lie.
  FLASH_DEVICE void modify(float (&accS)[kBlockM / 2], int key, int query, Ring<2> ring) const {
    const bool is_staged = maps.pairs.kind != PairKind::kNone;
    if (is_staged) ptx::mbarrier_wait(&shared.pairs.full[ring.stage], ring.parity);
    if (scores.has_slopes()) ptx::mbarrier_wait(&shared.ds_empty, ring.stage ^ 1);
    scores.modify(accS, key, query,
                  {maps.pairs.kind, shared_address(shared.pairs.tile[ring.stage]),
                   warpgroup * 64 + warp * 16, 0},
                  [&](int j, const uint32_t (&slopes)[8]) {
                    ptx::store_shared_v4(ds_place(ds_chunk(), warp, 2 * j), &slopes[0]);
                    ptx::store_shared_v4(ds_place(ds_chunk(), warp, 2 * j + 1), &slopes[4]);
                  });
    if (is_staged) release(&shared.pairs.empty[ring.stage]);
  }
  /// P^T in 16 bits, negative where dropped, from K Q^T.
  FLASH_DEVICE void make_weights(uint32_t (&rP)[kBlockM / 4], float (&accS)[kBlockM / 2],
                                 int m_block, int key, const KeptColumns& kept, bool is_masked,
                                 Ring<2> ring) const {
    const int query = m_block * kBlockM + (lane() & 3) * 2;
    const bool is_modified = scores.is_modified();
    if (is_modified) modify(accS, key, query, ring);
    if (is_masked) mask_scores<kBlockM>(kept, accS, m_block);
    scores.weights(rP, accS, ColumnValues(shared.lse_log2[ring.stage]),
                   is_modified ? 1.f : scores.scale());
    if (scores.has_dropout()) scores.mark_dropped(rP, key, query);
  }

  /// dS^T in place of dP^T, and the weights for dV. Afterwards dS may be put.
  FLASH_DEVICE void make_gradient(uint32_t (&rP)[kBlockM / 4], float (&accdP)[kBlockM / 2],
                                  Ring<2> ring) const {
    scores.template gradient</*kIsClean=*/true>(rP, accdP, ColumnValues(shared.delta[ring.stage]));
    if (scores.has_dropout()) scores.drop_marked(rP);
    if (scores.has_slopes()) {
#pragma unroll
      for (int j = 0; j < kBlockM / 16; ++j) {
        uint32_t slopes[4];
        ptx::load_shared_v4(slopes, ds_place(ds_chunk(), warp, j));
        scores.through_slopes(reinterpret_cast<float (&)[8]>(accdP[8 * j]), slopes);
      }
      __syncwarp();
    }
    ptx::mbarrier_wait(&shared.ds_empty, ring.stage ^ 1);
  }

  /// dbias of a block is its dS. One thread, when the warpgroup has put it.
  FLASH_DEVICE void store_bias_gradient(int m_block) const {
    if (!maps.has_dbias || warp != 0 || lane() != 0) return;
    ptx::tma_store_4d(maps.dbias, ds_chunk(), n_block * kBlockN + warpgroup * 64, m_block * kBlockM,
                      scores.head, scores.batch);
    ptx::bulk_commit();
  }
  /// This warp, and the store, no longer read dS.
  FLASH_DEVICE void end_step() const {
    if (maps.has_dbias && warp == 0 && lane() == 0) ptx::bulk_wait_read<0>();
    release(&shared.ds_empty);
  }
};

}  // namespace flash::cuda::sm90
