// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "cuda/sm90/backward_plan.h"
#include "cuda/sm90/tile_order.h"
#include "cuda/sm90/traits.cuh"

namespace flash::cuda::sm90 {

enum class DqOwner { kBothWarpgroups, kFirst };  // who computes dQ = dS K

// Rows of the tile table: kBlockM queries of a step, against kBlockN = 128 keys of the CTA.
// bf16, 16k tokens, hidden 2048, one H200; docs/hopper.md has what lost.
struct BackwardTileD64 {
  static constexpr int kBlockM = 128;
  static constexpr DqOwner kDqOwner = DqOwner::kBothWarpgroups;
};
struct BackwardTileD96 {  // half of its columns would cut a chunk of 64
  static constexpr int kBlockM = 64;
  static constexpr DqOwner kDqOwner = DqOwner::kFirst;
};
struct BackwardTileD128 {  // dQ by the first: from 4k -2 to +1 %, 1k -5 to -11 %
  static constexpr int kBlockM = 64;
  static constexpr DqOwner kDqOwner = DqOwner::kBothWarpgroups;
};

// General variant. kOverlapsDp: P is made under dP; head dim 128 has no registers for it.
struct BackwardTileD64General {  // 128 queries: within 2 %; dQ by one warpgroup: -30 %
  static constexpr int kBlockM = 64;
  static constexpr DqOwner kDqOwner = DqOwner::kBothWarpgroups;
  static constexpr bool kOverlapsDp = true;
};
struct BackwardTileD96General {
  static constexpr int kBlockM = 64;
  static constexpr DqOwner kDqOwner = DqOwner::kFirst;
  static constexpr bool kOverlapsDp = true;
};
struct BackwardTileD128General {
  static constexpr int kBlockM = 64;
  static constexpr DqOwner kDqOwner = DqOwner::kBothWarpgroups;
  static constexpr bool kOverlapsDp = false;
};

template <class Element_, int kHeadDim_, class Tile, Variant kVariant = Variant::kPlain>
struct BackwardTraits : Tile {
  using Element = Element_;
  using Tile::kBlockM, Tile::kDqOwner;
  static constexpr bool kGeneral = kVariant == Variant::kGeneral;
  static constexpr int kHeadDim = kHeadDim_, kBlockN = 128, kStages = 2, kThreads = 384;
  static constexpr int kQueryParts = 1, kQuerySlots = kStages;
  static constexpr bool kSumsDq = true;                                     // in global memory
  static constexpr int kChunks = (kHeadDim + 63) / 64, kChunksV = kChunks;  // of 64 columns
  // Share of one warpgroup in dQ of a block, 64 x kDqN: half of the rows if there are 128, else
  // half of the columns, or all of it.
  static constexpr bool kDqSplitsRows = kBlockM == 128;
  static constexpr bool kDqSplitsColumns = kBlockM == 64 && kDqOwner == DqOwner::kBothWarpgroups;
  static constexpr int kDqN = kDqSplitsColumns ? kHeadDim / 2 : kHeadDim;
  static constexpr int kDqSlices = kDqOwner == DqOwner::kBothWarpgroups ? 2 : 1;
  static constexpr int kSliceSize = 64 * kDqN;
  static constexpr int kDqSize = kBlockM * kHeadDim;  // floats of dQ of a block
  // 24 registers spill in the roles of the first warpgroup, never in the loops of the others. For
  // the converting warps 56 instead of 40: causal 512 -6 % of time.
  static constexpr bool kIsEven = kGeneral || kDqOwner == DqOwner::kBothWarpgroups;
  static constexpr int kEvenRegisters = kGeneral ? 232 : 224;
  static constexpr int kLoadRegisters = kIsEven ? 504 - 2 * kEvenRegisters : 24;
  static constexpr int kFirstRegisters = kIsEven ? kEvenRegisters : 256;
  static constexpr int kSecondRegisters = kIsEven ? kEvenRegisters : 224;
  static constexpr bool kOverlapsDp = [] {
    if constexpr (kGeneral) return Tile::kOverlapsDp;
    return true;
  }();
  // Tiles of a bias or mask come and go with Q; dS and the conversion of dQ give way to them.
  static constexpr int kPairStages = kGeneral ? kStages : 0, kDsStages = kGeneral ? 1 : kStages;
  static constexpr int kConvertParts = kGeneral ? 2 : 1;  // of a half of dQ of a block
  static constexpr bool kMayPrepare = !kGeneral;          // see BackwardSchedule::prepares_inside
  // dK and dV leave by TMA, from the stage of dS that the next step will write. It has room for
  // the 64 rows of both at head dim 64. At 128, partly from where dQ was: the same speed.
  static constexpr bool kStoresFromDs = !kGeneral && kBlockM == 128 && kHeadDim == 64;
  // Of one converting warp, in floats: a part of dQ, or O and dO of half a block of queries.
  static constexpr int kConvertSize =
      kMayPrepare ? kBlockM / 2 * kChunks * 64 : kDqSize / 2 / kConvertParts;
  static_assert(kDqSlices * kSliceSize == kDqSize &&
                    (kDqN == kHeadDim || kDqN % 64 == 0 || 64 % kDqN == 0),
                "the slices of dQ must cover it, and lie within chunks");

  struct SharedStorage {
    uint16_t k[kBlockN * kChunks * 64];
    uint16_t v[kBlockN * kChunks * 64];
    uint16_t q[kStages][kBlockM * kChunks * 64];
    uint16_t dout[kStages][kBlockM * kChunks * 64];
    uint16_t ds[kDsStages][kBlockM * kBlockN];  // rows = queries; chunk w: keys of warpgroup w
    [[no_unique_address]] PairStorage<kPairStages, kBlockM * kBlockN * 2> pairs;
    float dq[kDqSize];                              // on its way to global memory
    alignas(128) float converted[2][kConvertSize];  // half a block each
    float lse_log2[kStages][kBlockM], delta[kStages][kBlockM];
    uint64_t k_full, k_empty, v_full, v_empty;
    uint64_t q_full[kStages], q_empty[kStages], dout_full[kStages], dout_empty[kStages];
    uint64_t converted_full[2];
    uint64_t ds_empty;  // general variant
    uint64_t tile_full[2], tile_empty[2];
    int tile[2];  // index, -1: no more
  };
  static_assert(sizeof(SharedStorage) <= 232448, "exceeds the shared memory of one SM");
};

enum class NamedBarrier : int {
  kDsWritten = 1,
  kDqFull = 2,
  kDqEmpty = 4,
  kKeysClean = 6,
  kDsTaken = 8
};  // the last four: + slice or warpgroup

/// The workspace, and how the tiles are numbered.
struct BackwardSchedule {
  Divisor num_m_blocks, heads, heads_k;  ///< of a sequence; of a batch entry
  int num_n_blocks, num_tiles;
  TileOrder order;       ///< key blocks of key heads; in queries_kernel query blocks of heads
  Divisor dq_slots;      ///< heads in dq_sums: a ring that stays in L2
  bool ordered;          ///< deterministic: key blocks add to dQ in turn
  bool last_first;       ///< ordered, the last key bounded: the last key block of a section first
  bool prepares_inside;  ///< lse and delta by the converting warps, not by prepare_kernel
  float *lse_log2, *delta;  ///< (batch, num_heads, num_m_blocks * kBlockM): +inf, 0 in padding;
                            ///< general variant: lse itself
  float* dq_sums;           ///< (dq_slots, num_m_blocks, kDqSize) in register order
  DrawnWork* drawn;
  int* arrivals;  ///< (dq_slots, num_m_blocks), 0 at launch: additions to dQ
  int* opened;    ///< (dq_slots), 0 at launch: halves of query blocks made ready for a head
};

/// One key block of one key head; its query heads and their blocks of queries are looped over, so
/// that dK and dV of a group leave once.
struct BackwardTileId {
  int n_block, head_k, batch;
  Sequence q, k;
  Range visit, full;  ///< blocks of queries: all, and those without a masked pair
};

/// Tiles start in the order of their numbers (TileOrder). In a section of many heads neighbouring
/// key blocks of a head start some steps apart, and ordered additions find their turn come.
///
/// Nothing waits for a tile that starts later, so all end: an ordered addition waits for key blocks
/// of its head that are numbered before it; a slot of dq_slots >= the query heads of a section was
/// that of a head of an earlier section, whose sums are converted after heads before it only.
template <class Traits>
FLASH_DEVICE BackwardTileId backward_tile(const BackwardParams& p, const BackwardSchedule& schedule,
                                          int index) {
  const HeadBlock at = schedule.order.at(index);
  const int n_block = schedule.last_first ? schedule.num_n_blocks - 1 - at.block : at.block;
  const auto [batch, head_k] = schedule.heads_k.divide(at.head);
  const Sequence q = Sequence::of(p.q_layout, batch), k = Sequence::of(p.k_layout, batch);
  BlockRanges blocks{};
  if (n_block * Traits::kBlockN < k.length)  // else other sequences are longer
    blocks = p.mask_of(q, k).query_blocks<Traits::kBlockM, Traits::kBlockN>(n_block);
  if ((n_block + 1) * Traits::kBlockN > k.length)  // keys beyond the end keep nothing
    blocks.full = {blocks.visit.end, blocks.visit.end};
  return {n_block, head_k, batch, q, k, blocks.visit, blocks.full};
}

/// Key blocks that add to dQ of a block of queries. Exactly those whose tiles visit it, unless the
/// window is empty (which this backend does not take).
template <class Traits>
FLASH_DEVICE Range adding_blocks(const BackwardParams& p, const Sequence& q, const Sequence& k,
                                 int m_block) {
  if (m_block * Traits::kBlockM >= q.length) return {0, 0};
  return p.mask_of(q, k).key_blocks<Traits::kBlockM, Traits::kBlockN>(m_block).visit;
}

/// Next tile index for one warp of a consumer; -1 at the end.
template <class Shared>
FLASH_DEVICE int next_tile(Shared& shared, Ring<2>& slot) {
  ptx::mbarrier_wait(&shared.tile_full[slot.stage], slot.parity);
  const int index = shared.tile[slot.stage];
  release(&shared.tile_empty[slot.stage]);
  slot.advance();
  return to_uniform(index);
}

}  // namespace flash::cuda::sm90
