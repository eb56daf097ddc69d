// SPDX-License-Identifier: BSD-3-Clause
// dQ in a kernel of its own. A tile is 128 queries of one head, 64 a warpgroup, against all blocks
// of keys that one of them sees. Q and dO stay, K and V pass by. A step, for key block n:
//   dQ += dS(n - 1) K(n - 1);  S = Q K(n)^T;  dP = dO V(n)^T, P = exp(S - lse) under it
//   dS(n) = P o (dP - delta), an A fragment without leaving the registers
// K(n - 1) is given back first: at head dim 256, K has two stages and V one. Each warpgroup's
// arithmetic is hidden by the other's products.
// General variant: P in 16 bits, negative where dropped; dS may leave as dbias; a warp zeroes rows
// of K that nobody attends.
#pragma once

#include "cuda/sm90/backward_load.cuh"
#include "cuda/sm90/backward_mma.cuh"
#include "cuda/sm90/backward_scores.cuh"
#include "cuda/sm90/backward_separate_traits.cuh"

namespace flash::cuda::sm90 {

struct QueryTileId {
  int m_block, head, batch;
  Sequence q, k;
  Range visit;  ///< blocks of keys
};

/// The last block of queries of a head first: if causal, it sees the most keys.
template <class Traits>
FLASH_DEVICE QueryTileId query_tile(const BackwardParams& p, const BackwardSchedule& schedule,
                                    int index) {
  const HeadBlock at = schedule.order.at(index);
  const int m_block = schedule.num_m_blocks.value() - 1 - at.block;
  const auto [batch, head] = schedule.heads.divide(at.head);
  const Sequence q = Sequence::of(p.q_layout, batch), k = Sequence::of(p.k_layout, batch);
  return {m_block, head, batch, q, k, adding_blocks<Traits>(p, q, k, m_block)};
}

/// One thread. The first K of a tile is loaded while the tile before still uses Q.
template <class Traits>
FLASH_DEVICE void load_query_tiles(const BackwardMaps& maps, const BackwardParams& p,
                                   const BackwardSchedule& schedule,
                                   typename Traits::SharedStorage& shared) {
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  constexpr int kChunks = Traits::kChunks, kChunksV = Traits::kChunksV;
  Ring<Traits::kKeyStages> keys;
  Ring<Traits::kValueStages> values;
  Ring<Traits::kPairStages> pair_ring;
  Ring<2> slot;
  int q_parity = 1;
  for (int index = blockIdx.x; publish_tile(shared, slot, index, schedule.num_tiles);
       index = gridDim.x + atomicAdd(&schedule.drawn->query_tiles, 1)) {
    const QueryTileId tile = query_tile<Traits>(p, schedule, index);
    const int head_k = tile.head / p.gqa_ratio(), row = tile.m_block * kBlockM;
    const int64_t first_row =
        (int64_t{tile.batch} * p.num_heads + tile.head) * schedule.num_m_blocks.value() * kBlockM +
        row;
#pragma unroll 1
    for (int n_block = tile.visit.begin; n_block < tile.visit.end; ++n_block) {
      const bool is_first = n_block == tile.visit.begin;
      uint64_t* k_full = &shared.k_full[keys.stage];
      ptx::mbarrier_wait(&shared.k_empty[keys.stage], keys.parity ^ 1);
      ptx::mbarrier_expect_bytes(k_full, kBlockN * kChunks * 128);
      load_rows<kChunks>(maps.k, shared.k[keys.stage], k_full, kBlockN, tile.k, n_block * kBlockN,
                         head_k, ptx::kEvictLast);
      keys.advance();
      if (is_first) {
        ptx::mbarrier_wait(&shared.q_empty, q_parity);
        ptx::mbarrier_expect_bytes(&shared.q_full, kBlockM * (kChunks * 128 + 4));
        load_rows<kChunks>(maps.q, shared.q, &shared.q_full, kBlockM, tile.q, row, tile.head,
                           ptx::kEvictFirst);
        ptx::bulk_load(shared_address(shared.lse_log2), schedule.lse_log2 + first_row, kBlockM * 4,
                       &shared.q_full);
        ptx::mbarrier_wait(&shared.dout_empty, q_parity);
        ptx::mbarrier_expect_bytes(&shared.dout_full, kBlockM * (kChunksV * 128 + 4));
        load_rows<kChunksV>(maps.dout, shared.dout, &shared.dout_full, kBlockM, tile.q, row,
                            tile.head, ptx::kEvictFirst);
        ptx::bulk_load(shared_address(shared.delta), schedule.delta + first_row, kBlockM * 4,
                       &shared.dout_full);
        q_parity ^= 1;
      }
      uint64_t* v_full = &shared.v_full[values.stage];
      ptx::mbarrier_wait(&shared.v_empty[values.stage], values.parity ^ 1);
      ptx::mbarrier_expect_bytes(v_full, kBlockN * kChunksV * 128);
      load_rows<kChunksV>(maps.v, shared.v[values.stage], v_full, kBlockN, tile.k,
                          n_block * kBlockN, head_k, ptx::kEvictLast);
      values.advance();
      if constexpr (Traits::kGeneral)
        load_pairs<Traits>(maps.pairs, shared, pair_ring, tile.m_block, n_block, tile.head,
                           tile.batch);
    }
  }
}

/// One warp, general variant. Every block of K between the load and the products: rows of keys that
/// nobody attends become 0, or dQ = dS K would see what lies there. dS itself is 0 where P is.
template <class Traits>
FLASH_DEVICE void clean_key_blocks(const BackwardParams& p, const BackwardSchedule& schedule,
                                   typename Traits::SharedStorage& shared) {
  Ring<Traits::kKeyStages> keys;
  Ring<2> slot;
  const int lane = threadIdx.x % 32;
  for (int index; (index = next_tile(shared, slot)) >= 0;) {
    const QueryTileId tile = query_tile<Traits>(p, schedule, index);
    const AttendedKeys<typename Traits::Element, Variant::kGeneral> attended{p.features.score_mod,
                                                                             tile.batch, tile.head};
    for (int n_block = tile.visit.begin; n_block < tile.visit.end; ++n_block, keys.advance()) {
      ptx::mbarrier_wait(&shared.k_full[keys.stage], keys.parity);
      for (int row = lane; row < Traits::kBlockN; row += 32) {
        const int key = n_block * Traits::kBlockN + row;
        if (key < tile.k.length && !attended(key))
          clear_row<Traits::kBlockN, Traits::kChunks>(shared.k[keys.stage], row);
      }
      ptx::fence_proxy_async();  // before wgmma reads the zeros
      release(&shared.k_clean[keys.stage]);
    }
  }
}

template <class Traits>
struct QueriesCompute {
  using Element = typename Traits::Element;
  using Shared = typename Traits::SharedStorage;
  static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  static constexpr int kHeadDim = Traits::kHeadDim;

  const BackwardParams& p;
  const BackwardSchedule& schedule;
  Shared& shared;
  const int lane, warp, warpgroup;
  const float scale_log2;
  uint32_t sQ, sdO;
  uint64_t* const k_ready;

  float accdQ[kHeadDim / 2];
  uint32_t rdS[kBlockN / 4];
  float lse_log2[2], delta[2];  // of this thread's two rows; general variant: lse in units of 1
  Ring<Traits::kKeyStages> keys, previous;
  Ring<Traits::kValueStages> values;
  int row;           // the first of them
  KeptColumns kept;  // keys that they keep
  int q_parity = 0;
  // General variant:
  const BackwardMaps& maps;
  Ring<Traits::kPairStages> pair_ring;
  BackwardScores<Traits, BlockRows::kQueries> scores;

  FLASH_DEVICE QueriesCompute(const BackwardMaps& tensors, const BackwardParams& params,
                              const BackwardSchedule& s, Shared& storage, int warpgroup_index)
      : p(params),
        schedule(s),
        shared(storage),
        lane(threadIdx.x & 31),
        warp(warp_uniform((threadIdx.x >> 5) & 3)),
        warpgroup(to_uniform(warpgroup_index)),
        scale_log2(static_cast<float>(params.softmax_scale * 1.4426950408889634)),
        sQ(shared_address(storage.q) + warpgroup * 64 * 128),
        sdO(shared_address(storage.dout) + warpgroup * 64 * 128),
        k_ready(Traits::kGeneral && has_unattended_keys(params) ? storage.k_clean : storage.k_full),
        maps(tensors),
        scores{params} {}

  FLASH_DEVICE void issue_dq() {
    issue_fragment_by_rows<Element, kHeadDim, kBlockN>(accdQ, rdS, shared.k[previous.stage]);
  }
  FLASH_DEVICE void finish_dq() {
    ptx::pin(accdQ), ptx::pin(rdS);
    release(&shared.k_empty[previous.stage]);
  }
  FLASH_DEVICE void advance() {
    previous = keys;
    keys.advance();
    values.advance();
  }

  /// Waits for Q or dO of the tile, and reads lse or delta of this thread's rows.
  FLASH_DEVICE void meet_rows(uint64_t* full, const float* from, float (&to)[2]) const {
    ptx::mbarrier_wait(full, q_parity);
#pragma unroll
    for (int r = 0; r < 2; ++r) to[r] = from[warpgroup * 64 + warp * 16 + lane / 4 + 8 * r];
  }

  template <bool kIsFirst>
  FLASH_DEVICE void step(int n_block, bool is_masked, bool is_last) {
    float accS[kBlockN / 2], accdP[kBlockN / 2];
    // Else 64 descriptors, which do not change, are kept from step to step: in local memory.
    ptx::pin_register(sQ), ptx::pin_register(sdO);
    if constexpr (kIsFirst) {
      meet_rows(&shared.q_full, shared.lse_log2, lse_log2);
    } else {
      issue_dq();
    }
    ptx::mbarrier_wait(&k_ready[keys.stage], keys.parity);
    issue_rows_by_rows<Element, kHeadDim, kBlockM, kBlockN>(accS, sQ, shared.k[keys.stage]);
    if constexpr (kIsFirst) {
      meet_rows(&shared.dout_full, shared.delta, delta);
    } else {
      ptx::wgmma_wait<1>();
      finish_dq();
    }
    ptx::mbarrier_wait(&shared.v_full[values.stage], values.parity);
    issue_rows_by_rows<Element, Traits::kHeadDimV, kBlockM, kBlockN>(accdP, sdO,
                                                                     shared.v[values.stage]);
    ptx::wgmma_wait<1>();
    ptx::pin(accS);
    if (is_last) release(&shared.q_empty);
    const auto meet_dp = [&] {
      ptx::wgmma_wait<0>();
      ptx::pin(accdP);
      release(&shared.v_empty[values.stage]);
      if (is_last) release(&shared.dout_empty);
    };
    if constexpr (Traits::kGeneral) {
      general_gradient(accS, accdP, n_block, is_masked, meet_dp);
    } else {
      if (is_masked) mask_scores<kBlockN>(kept, accS, n_block);
#pragma unroll
      for (int i = 0; i < kBlockN / 2; ++i) {  // cut at 0: see probabilities()
        const float exponent = fmaf(accS[i], scale_log2, -lse_log2[i / 2 % 2]);
        accS[i] = exp2_approx(min_or_nan(exponent, 0.f));
      }
      meet_dp();
#pragma unroll
      for (int i = 0; i < kBlockN / 2; ++i) accdP[i] = accS[i] * (accdP[i] - delta[i / 2 % 2]);
    }
    to_fragment<Element>(rdS, accdP);
    advance();
  }

  /// dS in place of dP, which meet_dp() waits for; and dbias, if it is dS.
  template <class F>
  FLASH_DEVICE void general_gradient(float (&accS)[kBlockN / 2], float (&accdP)[kBlockN / 2],
                                     int n_block, bool is_masked, F&& meet_dp) {
    uint32_t rP[kBlockN / 4], slopes[kBlockN / 4];
    const int column = n_block * kBlockN + (lane & 3) * 2;
    with_pair_tile(maps.pairs, shared.pairs, pair_ring, [&](uint32_t tile) {
      scores.modify(accS, row, column,
                    {maps.pairs.kind, tile, warpgroup * 64 + warp * 16 + lane / 4, 0}, slopes);
    });
    if (is_masked) mask_scores<kBlockN>(kept, accS, n_block);
    scores.weights(rP, accS, RowValues{lse_log2});
    if (scores.has_dropout()) scores.mark_dropped(rP, row, column);
    meet_dp();
    scores.gradient(rP, accdP, RowValues{delta});
    if (maps.has_dbias) store_bias_gradient(accdP, n_block);
    if (scores.has_slopes()) scores.through_slopes(accdP, slopes);
  }

  /// dbias of a block is its dS. Pairs outside of the sequences are 0, or stay as they come.
  FLASH_DEVICE void store_bias_gradient(const float (&accdS)[kBlockN / 2], int n_block) const {
    const int64_t row_stride = p.k_layout.max, head_stride = row_stride * p.q_layout.max;
    const TensorView dbias{static_cast<uint16_t*>(p.dbias) + n_block * kBlockN,
                           head_stride * p.num_heads, head_stride, row_stride};
    const Sequence rows{0, scores.batch, scores.seqlen_q};
    store_rows<Element, kBlockN>(dbias, rows, scores.head, accdS, 1.f, row,
                                 p.k_layout.max - n_block * kBlockN);
  }

  /// All blocks of keys of the tile: masked, full, masked, as this warpgroup's rows see them. A
  /// block that only the other's rows see is masked whole; leaving it out moves ring positions to
  /// vector registers: 85 R2UR a step.
  FLASH_DEVICE void run_tile(const QueryTileId& tile) {
    const IntervalMask mask = p.mask_of(tile.q, tile.k);
    kept = KeptColumns(mask, row);
    const Range full = mask.key_blocks<kBlockM / 2, kBlockN>(tile.m_block * 2 + warpgroup).full;
    const int full_begin = to_uniform(full.begin), full_end = to_uniform(full.end);
    const int end = to_uniform(tile.visit.end);
    int n_block = to_uniform(tile.visit.begin);
    if constexpr (Traits::kGeneral) scores.begin_head(tile.batch, tile.head, tile.q, tile.k);
    step</*kIsFirst=*/true>(n_block, n_block < full_begin || n_block >= full_end,
                            n_block + 1 == end);
    ++n_block;
    if constexpr (!Traits::kGeneral) {  // its code is long: one loop
#pragma unroll 1
      for (; n_block < full_begin; ++n_block) step<false>(n_block, true, n_block + 1 == end);
#pragma unroll 1
      for (; n_block < full_end; ++n_block) step<false>(n_block, false, n_block + 1 == end);
    }
#pragma unroll 1
    for (; n_block < end; ++n_block)
      step<false>(n_block, !Traits::kGeneral || n_block < full_begin || n_block >= full_end,
                  n_block + 1 == end);
    issue_dq();
    ptx::wgmma_wait<0>();
    finish_dq();
  }

  FLASH_DEVICE void run() {
    Ring<2> slot;
    for (int index; (index = next_tile(shared, slot)) >= 0;) {
      const QueryTileId tile = query_tile<Traits>(p, schedule, index);
      row = tile.m_block * kBlockM + warpgroup * 64 + warp * 16 + lane / 4;
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) accdQ[i] = 0.f;
      if (tile.visit.begin < tile.visit.end) {
        run_tile(tile);
        q_parity ^= 1;
      }
      store_rows<Element, kHeadDim>(p.dq, tile.q, tile.head, accdQ,
                                    static_cast<float>(p.softmax_scale), row, p.head_dim);
    }
  }
};

template <class Traits>
FLASH_DEVICE void init_queries_barriers(typename Traits::SharedStorage& shared, bool cleans_keys) {
  ptx::mbarrier_init(&shared.q_full, 1);
  ptx::mbarrier_init_for_warps(&shared.q_empty, Traits::kMmaWarps);
  ptx::mbarrier_init(&shared.dout_full, 1);
  ptx::mbarrier_init_for_warps(&shared.dout_empty, Traits::kMmaWarps);
  for (int i = 0; i < Traits::kKeyStages; ++i) {
    ptx::mbarrier_init(&shared.k_full[i], 1);
    ptx::mbarrier_init_for_warps(&shared.k_empty[i], Traits::kMmaWarps);
    ptx::mbarrier_init_for_warps(&shared.k_clean[i], 1);
  }
  for (int i = 0; i < Traits::kValueStages; ++i) {
    ptx::mbarrier_init(&shared.v_full[i], 1);
    ptx::mbarrier_init_for_warps(&shared.v_empty[i], Traits::kMmaWarps);
  }
  for (int i = 0; i < 2; ++i) {
    ptx::mbarrier_init(&shared.tile_full[i], 1);
    ptx::mbarrier_init_for_warps(&shared.tile_empty[i], Traits::kMmaWarps + cleans_keys);
  }
  if constexpr (Traits::kGeneral) {
    for (int i = 0; i < Traits::kPairStages; ++i) {
      ptx::mbarrier_init(&shared.pairs.full[i], 1);
      ptx::mbarrier_init_for_warps(&shared.pairs.empty[i], Traits::kMmaWarps);
    }
  }
  ptx::mbarrier_init_fence();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    queries_kernel(const __grid_constant__ BackwardMaps maps,
                   const __grid_constant__ BackwardParams p,
                   const __grid_constant__ BackwardSchedule schedule) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(raw);
  const bool cleans_keys = Traits::kGeneral && has_unattended_keys(p);
  if (threadIdx.x == 0) init_queries_barriers<Traits>(shared, cleans_keys);
  __syncthreads();  // barriers exist before any role touches them

  const int warpgroup = warp_uniform(threadIdx.x >> 7);
  if (warpgroup == 0) {
    ptx::shrink_registers<Traits::kLoadRegisters>();
    if (threadIdx.x == 0) {
      load_query_tiles<Traits>(maps, p, schedule, shared);
      ptx::wait_for_previous_grid();  // so that this grid ends after keys_kernel
    }
    if constexpr (Traits::kGeneral) {
      if (warp_uniform(threadIdx.x >> 5) == 1 && cleans_keys)
        clean_key_blocks<Traits>(p, schedule, shared);
    }
  } else {
    ptx::grow_registers<Traits::kMmaRegisters>();
    QueriesCompute<Traits>(maps, p, schedule, shared, warpgroup - 1).run();
  }
}

}  // namespace flash::cuda::sm90
