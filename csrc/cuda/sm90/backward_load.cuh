// SPDX-License-Identifier: BSD-3-Clause
// The load thread of the backward.
#pragma once

#include "cuda/sm90/backward_traits.cuh"
#include "cuda/sm90/pair_loads.cuh"
#include "cuda/sm90/unattended_keys.cuh"
#include "primitives/ptx/global_sync.cuh"

namespace flash::cuda::sm90 {

struct BackwardMaps {
  TmaTensor q, k, v, dout;            ///< boxes of 64 columns
  TmaTensor half_out{}, half_dout{};  ///< prepares_inside: of half a block of queries
  TmaTensor dk{}, dv{};               ///< kStoresFromDs: of 64 keys
  // General variant:
  PairTiles pairs{};
  CUtensorMap dbias{};     ///< boxes of kBlockM queries x 64 keys
  bool has_dbias = false;  ///< the kernel writes it
};

/// Rows [row, + rows) of one sequence and head, kChunks chunks from column on; the bytes are
/// counted on `full`, which expects them.
template <int kChunks>
FLASH_DEVICE void load_rows(const TmaTensor& tensor, const uint16_t* tile, uint64_t* full, int rows,
                            const Sequence& sequence, int row, int head, uint64_t policy,
                            int column = 0) {
  const TmaRow first = tensor.first_row(sequence);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    ptx::tma_load_5d(shared_address(tile) + c * rows * 128, tensor.map, full, column + c * 64, head,
                     first.row + row, first.slice, tensor.wrap, policy);
  }
}

/// Tells the consumers the next tile, or that there are no more: false.
template <class Shared>
FLASH_DEVICE bool publish_tile(Shared& shared, Ring<2>& slot, int index, int num_tiles) {
  ptx::mbarrier_wait(&shared.tile_empty[slot.stage], slot.parity ^ 1);
  shared.tile[slot.stage] = index < num_tiles ? index : -1;
  ptx::mbarrier_arrive(&shared.tile_full[slot.stage]);
  slot.advance();
  return index < num_tiles;
}

/// General variant: keys that one query head attends and another does not are loaded for each,
/// where dQ = dS K would see what lies there.
template <class Traits>
FLASH_DEVICE bool reloads_keys(const BackwardParams& p) {
  return Traits::kGeneral && Traits::kSumsDq && has_unattended_keys(p);
}

/// A tile of a bias or mask, if there are any.
template <class Traits>
FLASH_DEVICE void load_pairs(const PairTiles& pairs, typename Traits::SharedStorage& shared,
                             Ring<Traits::kPairStages>& ring, int m_block, int n_block, int head,
                             int batch) {
  if (pairs.kind == PairKind::kNone) return;
  ptx::mbarrier_wait(&shared.pairs.empty[ring.stage], ring.parity ^ 1);
  load_pair_tile<Traits>(pairs, shared.pairs.tile[ring.stage], &shared.pairs.full[ring.stage],
                         m_block, n_block, head, batch);
  ring.advance();
}

template <class Traits>
FLASH_DEVICE bool prepares_inside(const BackwardSchedule& schedule) {
  return Traits::kMayPrepare && schedule.prepares_inside;
}

/// Until a head (of the whole batch) has its slot of the ring: sums of dQ are 0; with lse and delta
/// if they are prepared inside. Else the ring's first heads have theirs from prepare_kernel.
template <class Traits>
FLASH_DEVICE void wait_for_slot(const BackwardSchedule& schedule, int head) {
  const auto [generation, dq_slot] = schedule.dq_slots.divide(head);
  const int openings = generation + (prepares_inside<Traits>(schedule) ? 1 : 0);
  const int needed = openings * 2 * schedule.num_m_blocks.value();
  if (needed == 0) return;
  while (ptx::load_acquire(schedule.opened + dq_slot) < needed) {
  }
  ptx::fence_proxy_async_global();
}

/// Per tile and block of queries: Q with lse, in kQueryParts, dO with delta; K and V after the
/// first of them, because those of the tile before are still in use when its successor's first
/// block can be loaded.
template <class Traits>
FLASH_DEVICE void load_backward_tiles(const BackwardMaps& maps, const BackwardParams& p,
                                      const BackwardSchedule& schedule,
                                      typename Traits::SharedStorage& shared) {
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  constexpr int kRowBytes = Traits::kChunks * 128, kRowBytesV = Traits::kChunksV * 128;
  constexpr int kParts = Traits::kQueryParts, kPartChunks = Traits::kChunks / kParts;
  Ring<Traits::kQuerySlots> queries;
  Ring<Traits::kStages> ring;
  Ring<Traits::kPairStages> pair_ring;
  Ring<2> slot;
  int kv_parity = 1;
  while (true) {
    // Not earlier: a tile drawn while a long one begins is late (causal -5 to -9 %).
    const int index = atomicAdd(&schedule.drawn->tiles, 1);
    if (!publish_tile(shared, slot, index, schedule.num_tiles)) return;
    const BackwardTileId tile = backward_tile<Traits>(p, schedule, index);
    bool is_first = true;
    for (int g = 0; g < p.gqa_ratio(); ++g) {
      const int head = tile.head_k * p.gqa_ratio() + g;
      const int head_index = tile.batch * p.num_heads + head;
      const int64_t rows = int64_t{head_index} * schedule.num_m_blocks.value() * kBlockM;
      if (prepares_inside<Traits>(schedule)) wait_for_slot<Traits>(schedule, head_index);
      if (reloads_keys<Traits>(p)) is_first = true;
#pragma unroll 1
      for (int m_block = tile.visit.begin; m_block < tile.visit.end; ++m_block) {
        const int row = m_block * kBlockM;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          uint64_t* q_full = &shared.q_full[queries.stage];
          ptx::mbarrier_wait(&shared.q_empty[queries.stage], queries.parity ^ 1);
          ptx::mbarrier_expect_bytes(q_full, kBlockM * (kPartChunks * 128 + (part == 0 ? 4 : 0)));
          load_rows<kPartChunks>(maps.q, shared.q[queries.stage], q_full, kBlockM, tile.q, row,
                                 head, ptx::kEvictLast, part * kPartChunks * 64);
          if (part == 0)
            ptx::bulk_load(shared_address(shared.lse_log2[queries.stage]),
                           schedule.lse_log2 + rows + row, kBlockM * 4, q_full);
          queries.advance();
        }
        uint64_t* dout_full = &shared.dout_full[ring.stage];
        ptx::mbarrier_wait(&shared.dout_empty[ring.stage], ring.parity ^ 1);
        ptx::mbarrier_expect_bytes(dout_full, kBlockM * (kRowBytesV + 4));
        load_rows<Traits::kChunksV>(maps.dout, shared.dout[ring.stage], dout_full, kBlockM, tile.q,
                                    row, head, ptx::kEvictLast);
        ptx::bulk_load(shared_address(shared.delta[ring.stage]), schedule.delta + rows + row,
                       kBlockM * 4, dout_full);
        ring.advance();
        if constexpr (Traits::kGeneral)
          load_pairs<Traits>(maps.pairs, shared, pair_ring, m_block, tile.n_block, head,
                             tile.batch);
        if (!is_first) continue;
        ptx::mbarrier_wait(&shared.v_empty, kv_parity);
        ptx::mbarrier_expect_bytes(&shared.v_full, kBlockN * kRowBytesV);
        load_rows<Traits::kChunksV>(maps.v, shared.v, &shared.v_full, kBlockN, tile.k,
                                    tile.n_block * kBlockN, tile.head_k, ptx::kEvictFirst);
        ptx::mbarrier_wait(&shared.k_empty, kv_parity);
        ptx::mbarrier_expect_bytes(&shared.k_full, kBlockN * kRowBytes);
        load_rows<Traits::kChunks>(maps.k, shared.k, &shared.k_full, kBlockN, tile.k,
                                   tile.n_block * kBlockN, tile.head_k, ptx::kEvictFirst);
        kv_parity ^= 1;
        is_first = false;
      }
    }
  }
}

}  // namespace flash::cuda::sm90
