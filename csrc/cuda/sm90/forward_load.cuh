// SPDX-License-Identifier: BSD-3-Clause
// The two threads of the forward that move tiles: one loads Q, K, V, one stores O.
#pragma once

#include "cuda/sm90/scheduler.cuh"

namespace flash::cuda::sm90 {

struct ForwardMaps {
  CUtensorMap q, k, v, out;  ///< coordinates (column, row, head, batch), boxes of 64 columns
};

/// Rows [block * rows, + rows) of one head: kChunks copies, counted on `full`.
template <class Traits>
FLASH_DEVICE void load_tile(const CUtensorMap& map, uint16_t* tile, uint64_t* full, int rows,
                            int block, int head, int batch, uint64_t policy) {
  ptx::mbarrier_expect_bytes(full, rows * Traits::kChunks * 128);
#pragma unroll
  for (int c = 0; c < Traits::kChunks; ++c) {
    ptx::tma_load_4d(shared_address(tile) + c * rows * 128, map, full, c * 64, block * rows, head,
                     batch, policy);
  }
}

/// One thread. Per tile: Q and its TileId, then K(last), {K(n - 1), V(n)} ...: V follows K by one
/// block, as the consumers do. A tile that failed comes back here with its stage of Q, and is sent
/// again. When the schedule is empty, every stage must still come back once before the end.
template <class Traits>
FLASH_DEVICE void load_tiles(const ForwardMaps& maps, const ForwardParams& p,
                             const ForwardSchedule& schedule,
                             typename Traits::SharedStorage& shared) {
  Ring<Traits::kQueryStages> q_ring;
  Ring<Traits::kStages> k_ring, v_ring;
  const IntervalMask mask = p.mask.of(p.q_layout.max, p.k_layout.max);
  int pauses = 0;                 // since the last tile
  ptx::wait_for_previous_grid();  // every access to global memory follows from a load below

  for (int index = blockIdx.x;;) {
    ptx::mbarrier_wait(&shared.q_empty[q_ring.stage], q_ring.parity ^ 1);
    const int again = Traits::kStoresThroughQ ? shared.failed[q_ring.stage] : -1;
    if (again < 0 && index >= schedule.num_tiles) {
      ptx::launch_next_grid();
      const bool stop = !Traits::kStoresThroughQ || pauses == Traits::kQueryStages - 1;
      shared.tile[q_ring.stage].m_block = stop ? TileId::kStop : TileId::kFinish;
      ptx::mbarrier_arrive(&shared.q_full[q_ring.stage]);
      if (stop) return;
      ++pauses;
      q_ring.advance();
      continue;
    }
    pauses = 0;
    TileId tile = schedule.tile(again >= 0 ? again : index, p.num_heads);
    if (again >= 0) {
      tile.index = ~again;
      shared.failed[q_ring.stage] = -1;
    } else {
      index = schedule.after(index);
    }
    shared.tile[q_ring.stage] = tile;
    const int head_k = tile.head / p.gqa_ratio();
    load_tile<Traits>(maps.q, shared.q[q_ring.stage], &shared.q_full[q_ring.stage], Traits::kBlockM,
                      tile.m_block, tile.head, tile.batch, ptx::kEvictFirst);
    q_ring.advance();
    const Range blocks =
        key_blocks<Traits::kBlockN>(mask, tile.m_block * Traits::kBlockM, Traits::kBlockM).visit;
    for (int n = blocks.end - 1; n >= blocks.begin - 1; --n) {
      if (n >= blocks.begin) {
        ptx::mbarrier_wait(&shared.k_empty[k_ring.stage], k_ring.parity ^ 1);
        load_tile<Traits>(maps.k, shared.k[k_ring.stage], &shared.k_full[k_ring.stage],
                          Traits::kBlockN, n, head_k, tile.batch, ptx::kEvictLast);
        k_ring.advance();
      }
      if (n == blocks.end - 1) continue;
      ptx::mbarrier_wait(&shared.v_empty[v_ring.stage], v_ring.parity ^ 1);
      load_tile<Traits>(maps.v, shared.v[v_ring.stage], &shared.v_full[v_ring.stage],
                        Traits::kBlockN, n + 1, head_k, tile.batch, ptx::kEvictLast);
      v_ring.advance();
    }
  }
}

/// One thread. O of each warpgroup as soon as it lies in its rows of Q; then the stage goes back to
/// the load thread. The warpgroups never wait for a store.
template <class Traits>
FLASH_DEVICE void store_tiles(const ForwardMaps& maps, typename Traits::SharedStorage& shared) {
  Ring<Traits::kQueryStages> ring;
  unsigned parities = 0;  // of o_full, one bit per stage
  while (true) {
    ptx::mbarrier_wait(&shared.q_full[ring.stage], ring.parity);
    const TileId tile = shared.tile[ring.stage];
    if (tile.m_block == TileId::kStop) return;
    if (tile.m_block == TileId::kFinish) {
      ptx::mbarrier_arrive(&shared.q_empty[ring.stage]);
      ring.advance();
      continue;
    }
    for (int warpgroup = 0; warpgroup < Traits::kMmaWarpgroups; ++warpgroup) {
      ptx::mbarrier_wait(&shared.o_full[ring.stage][warpgroup], parities >> ring.stage & 1);
#pragma unroll
      for (int c = 0; c < Traits::kChunks; ++c) {
        ptx::tma_store_4d(
            maps.out,
            shared_address(shared.q[ring.stage]) + (c * Traits::kBlockM + warpgroup * 64) * 128,
            c * 64, tile.m_block * Traits::kBlockM + warpgroup * 64, tile.head, tile.batch);
      }
      ptx::bulk_commit();
    }
    if (shared.failed[ring.stage] >= 0) {
      ptx::bulk_wait_written<0>();  // the second O of this tile must land after this one
    } else {
      ptx::bulk_wait_read<0>();
    }
    ptx::mbarrier_arrive(&shared.q_empty[ring.stage]);
    parities ^= 1u << ring.stage;
    ring.advance();
  }
}

}  // namespace flash::cuda::sm90
