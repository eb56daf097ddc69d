// SPDX-License-Identifier: BSD-3-Clause
// Who moves tiles in the forward: a thread loads Q, K, V, another stores O; in the general variant
// a third loads tiles of a bias or mask, and a warp cleans K and V.
#pragma once

#include "cuda/sm90/pair_loads.cuh"
#include "cuda/sm90/scheduler.cuh"
#include "cuda/sm90/unattended_keys.cuh"

namespace flash::cuda::sm90 {

struct ForwardMaps {
  TmaTensor q, k, v, out;  ///< boxes of 64 columns
  PairTiles pairs;         ///< general variant
};

/// Rows [block * rows, + rows) of one sequence and head, or heads from there on: `chunks` copies,
/// counted on `full`.
FLASH_DEVICE void load_tile(const TmaTensor& tensor, uint16_t* tile, uint64_t* full, int rows,
                            int chunks, TmaRow first, int block, int head, uint64_t policy) {
  const int row = first.row + (block * rows >> tensor.log2_heads);
  ptx::mbarrier_expect_bytes(full, rows * chunks * 128);
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    ptx::tma_load_5d(shared_address(tile) + c * rows * 128, tensor.map, full, c * 64, head, row,
                     first.slice, tensor.wrap, policy);
  }
}

/// keys(place, n) and values(place, n) for the blocks of a tile, in the order of the ring.
template <class KeyValueRing, class Keys, class Values>
FLASH_DEVICE void for_each_block(KeyValueRing& ring, Range blocks, Keys&& keys, Values&& values) {
  for (int n = blocks.end - 1; n >= blocks.begin - 1; --n) {
    const bool is_first = n == blocks.end - 1, is_last = n == blocks.begin - 1;
    if (!is_last) keys(ring.keys(), n);
    if (!is_first) values(is_last ? ring.last_values() : ring.values(), n + 1);
  }
}

/// One thread. Per tile: Q and its TileId, then blocks of K and V. A tile that failed comes back
/// here with its stage of Q, and is sent again. When the schedule is empty, every stage must still
/// come back once before the end.
///
/// kKeysFirst: the only stage of Q is in use until the last block of the tile before; K(last) need
/// not wait for it.
template <class Traits>
FLASH_DEVICE void load_tiles(const ForwardMaps& maps, const ForwardParams& p,
                             const ForwardSchedule& schedule,
                             typename Traits::SharedStorage& shared) {
  Ring<Traits::kQueryStages> q_ring;
  typename Traits::KeyValueRing ring;
  int pauses = 0;                 // since the last tile
  ptx::wait_for_previous_grid();  // every access to global memory follows from a load below
  const int num_tiles = schedule.tiles(p);
  int rank = 0;  // of a ragged batch: where the search for the next tile begins

  const auto await_stage_of_q = [&] {
    ptx::mbarrier_wait(&shared.q_empty[q_ring.stage], q_ring.parity ^ 1);
  };
  for (int index = schedule.is_for_none() ? num_tiles : blockIdx.x;;) {
    if (!Traits::kKeysFirst) await_stage_of_q();
    const int again = Traits::kMayRedo ? shared.failed[q_ring.stage] : -1;
    if (again < 0 && index >= num_tiles) {
      if (Traits::kKeysFirst) await_stage_of_q();
      const bool stop = !Traits::kStoresThroughQ || pauses == Traits::kQueryStages - 1;
      shared.tile[q_ring.stage].m_block = stop ? TileId::kStop : TileId::kFinish;
      ptx::mbarrier_arrive(&shared.q_full[q_ring.stage]);
      if (stop) return;
      ++pauses;
      q_ring.advance();
      continue;
    }
    const int now = again >= 0 ? again : index;
    if (again < 0) index = schedule.after(index);
    TileId tile = schedule.tile(now, p, rank);
    if (!schedule.take_keys(tile, p)) continue;
    if (again >= 0) {
      tile.index = ~again;
      shared.failed[q_ring.stage] = -1;
    }
    pauses = 0;
    const Range queries =
        queries_of(maps.q.log2_heads, tile.m_block * Traits::kBlockM, Traits::kBlockM);
    const Range blocks = key_blocks<Traits::kBlockN>(mask_of(p, tile), queries).visit;
    tile.visit = blocks;
    const auto load_q = [&] {
      shared.tile[q_ring.stage] = tile;
      load_tile(maps.q, shared.q[q_ring.stage], &shared.q_full[q_ring.stage], Traits::kBlockM,
                Traits::kChunks, maps.q.first_row(tile.q), tile.m_block, tile.head,
                ptx::kEvictFirst);
      q_ring.advance();
    };
    if (!Traits::kKeysFirst) load_q();
    const int head_k = schedule.gqa_ratio.quotient(tile.head);
    const TmaRow k_first = maps.k.first_row(tile.k), v_first = maps.v.first_row(tile.k);
    const auto load_block = [&](const TmaTensor& tensor, int chunks, TmaRow first, Place at,
                                int n) {
      ptx::mbarrier_wait(&shared.kv_empty[at.stage], at.parity ^ 1);
      load_tile(tensor, shared.kv[at.stage], &shared.kv_full[at.stage], Traits::kBlockN, chunks,
                first, n, head_k, ptx::kEvictLast);
    };
    const auto load_keys = [&](Place at, int n) {
      load_block(maps.k, Traits::kChunks, k_first, at, n);
      if (!Traits::kKeysFirst || n < blocks.end - 1) return;
      await_stage_of_q();
      load_q();
    };
    for_each_block(ring, blocks, load_keys,
                   [&](Place at, int n) { load_block(maps.v, Traits::kChunksV, v_first, at, n); });
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
    if (tile.m_block == TileId::kFinish) {  // back when all have seen it: it may be written again
      for (auto& seen : shared.o_full[ring.stage])
        ptx::mbarrier_wait(&seen, parities >> ring.stage & 1);
      ptx::mbarrier_arrive(&shared.q_empty[ring.stage]);
      parities ^= 1u << ring.stage;
      ring.advance();
      continue;
    }
    const TmaRow first = maps.out.first_row(tile.q);
    for (int warpgroup = 0; warpgroup < Traits::kMmaWarpgroups; ++warpgroup) {
      ptx::mbarrier_wait(&shared.o_full[ring.stage][warpgroup], parities >> ring.stage & 1);
      const int row = (tile.m_block * Traits::kBlockM + warpgroup * 64) >> maps.out.log2_heads;
#pragma unroll
      for (int c = 0; c < Traits::kChunksV; ++c) {
        ptx::tma_store_5d(
            maps.out.map,
            shared_address(shared.q[ring.stage]) + (c * Traits::kBlockM + warpgroup * 64) * 128,
            c * 64, tile.head, first.row + row, first.slice, maps.out.wrap);
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

/// f(tile) for every tile, in the order of the load thread, whose stage comes back only when all
/// who follow have let it go.
template <class Traits, bool kIsWarp, class F>
FLASH_DEVICE void follow_tiles(typename Traits::SharedStorage& shared, F&& f) {
  Ring<Traits::kQueryStages> ring;
  while (true) {
    ptx::mbarrier_wait(&shared.q_full[ring.stage], ring.parity);
    const TileId tile = shared.tile[ring.stage];
    if (tile.m_block == TileId::kStop) return;
    if (tile.m_block != TileId::kFinish) f(tile);
    uint64_t* const let_go = &shared.q_empty[ring.stage];
    kIsWarp ? release(let_go) : ptx::mbarrier_arrive(let_go);
    ring.advance();
  }
}

/// One warp, general variant. Every block of K and V between the load and the products: rows of
/// keys that nobody attends become 0.
template <class Traits>
FLASH_DEVICE void clean_keys(const ForwardParams& p, typename Traits::SharedStorage& shared) {
  typename Traits::KeyValueRing ring;
  const int lane = threadIdx.x % 32;
  follow_tiles<Traits, true>(shared, [&](const TileId& tile) {
    const AttendedKeys<typename Traits::Element, Variant::kGeneral> keys{p.features.score_mod,
                                                                         tile.batch, tile.head};
    const auto clean = [&](Place at, int n) {
      unsigned dropped = 0;  // rows lane + 32 i; found while the block is on its way
#pragma unroll
      for (int i = 0; i < Traits::kBlockN / 32; ++i) {
        const int key = n * Traits::kBlockN + lane + 32 * i;
        if (key < tile.k.length && !keys(key)) dropped |= 1u << i;
      }
      ptx::mbarrier_wait(&shared.kv_full[at.stage], at.parity);
      for (; dropped; dropped &= dropped - 1)
        clear_row<Traits::kBlockN, Traits::kChunks>(shared.kv[at.stage],
                                                    lane + 32 * (__ffs(dropped) - 1));
      ptx::fence_proxy_async();  // before wgmma reads the zeros
      release(&shared.kv_clean[at.stage]);
    };
    for_each_block(ring, tile.visit, clean, clean);
  });
}

/// One thread, general variant: a tile of pairs for every block of keys.
template <class Traits>
FLASH_DEVICE void load_pairs(const PairTiles& pairs, typename Traits::SharedStorage& shared) {
  Ring<Traits::kPairStages> ring;
  follow_tiles<Traits, false>(shared, [&](const TileId& tile) {
    for (int n = tile.visit.end - 1; n >= tile.visit.begin; --n) {
      ptx::mbarrier_wait(&shared.pairs.empty[ring.stage], ring.parity ^ 1);
      load_pair_tile<Traits>(pairs, shared.pairs.tile[ring.stage], &shared.pairs.full[ring.stage],
                             tile.m_block, n, tile.head, tile.batch);
      ring.advance();
    }
  });
}

}  // namespace flash::cuda::sm90
