// SPDX-License-Identifier: BSD-3-Clause
// What a warpgroup does with its 64 keys of every tile of the CTA.
//
//   S = K Q^T, dP = V dO^T
//   P under dP; dS, to shared memory
//   dV += P^T dO
//   all of dS is there: barrier of both
//   dQ = dS K, dK += dS^T Q
//   dQ leaves under dK
//
// General variant: with P in 16 bits and the features between the products.
#pragma once

#include "cuda/sm90/backward_dq.cuh"
#include "cuda/sm90/backward_general.cuh"
#include "cuda/sm90/backward_mma.cuh"
#include "cuda/sm90/swizzled_rows.cuh"

namespace flash::cuda::sm90 {

template <class Traits>
struct BackwardCompute {
  using Element = typename Traits::Element;
  using Shared = typename Traits::SharedStorage;
  static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr bool kGeneral = Traits::kGeneral;

  const BackwardMaps& maps;
  const BackwardParams& p;
  const BackwardSchedule& schedule;
  Shared& shared;
  const int warpgroup, lane, warp;
  const float scale_log2;
  const uint32_t sK, sV;

  float accdK[kHeadDim / 2], accdV[kHeadDim / 2];
  uint32_t rdS[kBlockM / 4];
  Ring<2> ring;
  int key;           // first of this thread's two
  KeptColumns kept;  // queries that they keep
  GeneralStep<Traits> general;

  FLASH_DEVICE BackwardCompute(const BackwardMaps& tensors, const BackwardParams& params,
                               const BackwardSchedule& s, Shared& storage, int warpgroup_index)
      : maps(tensors),
        p(params),
        schedule(s),
        shared(storage),
        warpgroup(warpgroup_index),
        lane(threadIdx.x & 31),
        warp(warp_uniform((threadIdx.x >> 5) & 3)),
        scale_log2(static_cast<float>(params.softmax_scale * 1.4426950408889634)),
        sK(shared_address(storage.k) + warpgroup * 64 * 128),
        sV(shared_address(storage.v) + warpgroup * 64 * 128),
        general(tensors, params, storage, warpgroup_index) {}

  FLASH_DEVICE uint32_t ds_chunk(int stage) const {
    return shared_address(shared.ds[stage]) + warpgroup * kBlockM * 128;
  }

  /// S^T and dP^T of a block are issued; S^T has arrived and become P^T, in rP if kGeneral.
  FLASH_DEVICE void begin_step(float (&accS)[kBlockM / 2], float (&accdP)[kBlockM / 2],
                               uint32_t (&rP)[kBlockM / 4], int m_block, bool is_masked) {
    const int stage = ring.stage;
    ptx::mbarrier_wait(&shared.q_full[stage], ring.parity);
    issue_rows_by_rows<Element, kHeadDim, kBlockN, kBlockM>(accS, sK, shared.q[stage]);
    const auto issue_dp = [&] {
      ptx::mbarrier_wait(&shared.dout_full[stage], ring.parity);
      issue_rows_by_rows<Element, kHeadDim, kBlockN, kBlockM>(accdP, sV, shared.dout[stage]);
    };
    if (Traits::kOverlapsDp) issue_dp();
    ptx::wgmma_wait<Traits::kOverlapsDp ? 1 : 0>();
    ptx::pin(accS);
    if constexpr (kGeneral) {
      general.make_weights(rP, accS, m_block, key, kept, is_masked, ring);
    } else {
      if (is_masked) mask_scores<kBlockM>(kept, accS, m_block);
      probabilities<kBlockM>(accS, scale_log2, shared.lse_log2[stage]);
      to_fragment<Element>(rP, accS);
    }
    if (!Traits::kOverlapsDp) {
      ptx::pin(rP);
      issue_dp();
    }
  }

  FLASH_DEVICE void step(int m_block, bool is_masked, bool is_last) {
    const int stage = ring.stage, ds_stage = Traits::kDsStages == 1 ? 0 : stage;
    float accS[kBlockM / 2], accdP[kBlockM / 2];
    uint32_t rP[kBlockM / 4];
    begin_step(accS, accdP, rP, m_block, is_masked);
    ptx::wgmma_wait<0>();
    ptx::pin(accdP);
    if (is_last) release(&shared.v_empty);
    if constexpr (kGeneral) {
      general.make_gradient(rP, accdP, ring);
    } else {
      scores_gradient<kBlockM>(accS, accdP, shared.delta[stage]);
    }
    to_fragment<Element>(rdS, accdP);
    put_ds<kBlockM>(ds_chunk(ds_stage), rdS, warp);
    issue_fragment_by_rows<Element, kHeadDim, kBlockM>(accdV, rP, shared.dout[stage]);
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(barrier_of(NamedBarrier::kDsWritten, 0), 256);
    if constexpr (kGeneral) general.store_bias_gradient(m_block);
    if (Traits::kDqOwner == DqOwner::kBothWarpgroups || warpgroup == 0) {
      float accdQ[Traits::kDqN / 2];
      issue_dq<Traits>(accdQ, shared.ds[ds_stage], shared.k, warpgroup);
      ptx::wgmma_wait<1>();
      ptx::pin(accdV), ptx::pin(rP);
      release(&shared.dout_empty[stage]);
      issue_fragment_by_rows<Element, kHeadDim, kBlockM>(accdK, rdS, shared.q[stage]);
      ptx::wgmma_wait<1>();
      ptx::pin(accdQ);
      if (is_last) release(&shared.k_empty);
      put_dq<Traits>(shared, accdQ, warpgroup);
    } else {
      ptx::wgmma_wait<0>();
      ptx::pin(accdV), ptx::pin(rP);
      release(&shared.dout_empty[stage]);
      if (is_last) release(&shared.k_empty);
      issue_fragment_by_rows<Element, kHeadDim, kBlockM>(accdK, rdS, shared.q[stage]);
    }
    ptx::wgmma_wait<0>();
    ptx::pin(accdK), ptx::pin(rdS);
    release(&shared.q_empty[stage]);
    if constexpr (kGeneral) general.end_step();
    ring.advance();
  }

  /// All blocks of queries of one query head: masked, full, masked. `is_last_head` of those that
  /// use this K and V.
  FLASH_DEVICE void run_head(const BackwardTileId& tile, bool is_last_head) {
    const int full_end = to_uniform(tile.full.end), end = to_uniform(tile.visit.end);
    const int full_begin = to_uniform(tile.full.begin);
    int m_block = to_uniform(tile.visit.begin);
    auto next = [&](bool is_masked) {
      step(m_block, is_masked, is_last_head && m_block + 1 == end);
      ++m_block;
    };
    if constexpr (kGeneral) {  // one loop: its code is long
#pragma unroll 1
      while (m_block < end) next(m_block < full_begin || m_block >= full_end);
    } else {
#pragma unroll 1
      while (m_block < full_begin) next(/*is_masked=*/true);
#pragma unroll 1
      while (m_block < full_end) next(/*is_masked=*/false);
#pragma unroll 1
      while (m_block < end) next(/*is_masked=*/true);
    }
  }

  /// dK and dV of the tile, through the stage of dS of the next step. Nobody reads that: dQ of the
  /// step before the last was complete when its warpgroup let the other have dS of the last.
  FLASH_DEVICE void store_from_ds(const BackwardTileId& tile) {
    const uint32_t dv = ds_chunk(ring.stage), dk = dv + 64 * 128;
    const float scale = static_cast<float>(p.softmax_scale);
    put_rows<Element, 64>(accdV, {1.f, 1.f}, dv);
    put_rows<Element, 64>(accdK, {scale, scale}, dk);
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(barrier_of(NamedBarrier::kDsTaken, warpgroup), 128);  // all have put
    if ((threadIdx.x & 127) != 0) return;
    const auto store = [&](const TmaTensor& tensor, uint32_t rows) {
      const TmaRow first = tensor.first_row(tile.k);
      ptx::tma_store_5d(tensor.map, rows, 0, tile.head_k,
                        first.row + tile.n_block * kBlockN + warpgroup * 64, first.slice,
                        tensor.wrap);
    };
    if (p.dv.data) store(maps.dv, dv);
    if (p.dk.data) store(maps.dk, dk);
    ptx::bulk_commit();
  }
  /// dS, and after the last tile shared memory, may be given to others.
  FLASH_DEVICE void wait_for_stores() const {
    if ((threadIdx.x & 127) == 0) ptx::bulk_wait_read<0>();
    ptx::named_barrier_sync(barrier_of(NamedBarrier::kDsTaken, warpgroup), 128);
  }

  FLASH_DEVICE void run() {
    Ring<2> slot;
    int kv_parity = 0;
    for (int index; (index = next_tile(shared, slot)) >= 0;) {
      const BackwardTileId tile = backward_tile<Traits>(p, schedule, index);
      if constexpr (Traits::kStoresFromDs) wait_for_stores();
      key = tile.n_block * kBlockN + warpgroup * 64 + warp * 16 + lane / 4;
      kept = KeptColumns(p.mask_of(tile.q, tile.k).transposed(), key);
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) accdK[i] = accdV[i] = 0.f;
      if (tile.visit.begin < tile.visit.end) {
        const auto wait_for_keys = [&] {
          ptx::mbarrier_wait(&shared.k_full, kv_parity);
          ptx::mbarrier_wait(&shared.v_full, kv_parity);
          kv_parity ^= 1;
        };
        wait_for_keys();
        const bool reloads = reloads_keys<Traits>(p);
#pragma unroll 1
        for (int g = 0; g < p.gqa_ratio(); ++g) {
          if constexpr (kGeneral) {
            general.begin_head(tile, tile.head_k * p.gqa_ratio() + g);
            if (reloads && g > 0) wait_for_keys();
            if (reloads) general.clean_keys();
          }
          run_head(tile, reloads || g + 1 == p.gqa_ratio());
        }
      }
      if constexpr (Traits::kStoresFromDs) {
        store_from_ds(tile);
      } else {
        const float dv_scale = kGeneral ? general.scores.dropout_scale() : 1.f;
        store_rows<Element, kHeadDim, /*kInOne=*/true>(p.dv, tile.k, tile.head_k, accdV, dv_scale,
                                                       key, p.head_dim_v);
        store_rows<Element, kHeadDim, /*kInOne=*/true>(
            p.dk, tile.k, tile.head_k, accdK, static_cast<float>(p.softmax_scale), key, p.head_dim);
      }
    }
    if constexpr (Traits::kStoresFromDs) wait_for_stores();
  }
};

}  // namespace flash::cuda::sm90
