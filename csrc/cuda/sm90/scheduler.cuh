// SPDX-License-Identifier: BSD-3-Clause
// Which tile a CTA does next, and which blocks of keys a tile visits.
#pragma once

#include "cuda/sm90/divisor.h"
#include "cuda/sm90/key_runs.h"
#include "cuda/sm90/sequence_order.h"
#include "cuda/sm90/traits.cuh"

namespace flash::cuda::sm90 {

/// Tiles that a launch does, by what a mask of keys keeps for them.
enum class RunsTaken { kAll, kWhole, kWithHoles };

/// Tiles are numbered in the order in which they should start.
///   ragged    sequence after sequence, the longest first, so that the last tiles are short; within
///             one as causal, which is never worse
///   causal    within a section of heads whose K and V share L2, late rows first: they see the most
///             keys. Against the plain order +31 % at 512 tokens, +21 % at 1k, +44 % at 16k.
///   else      all tiles of a head together
/// Heads that share a tile (TmaTensor::log2_heads) are numbered as one.
struct ForwardSchedule {
  int num_tiles;   ///< ragged: at most
  int log2_heads;  ///< of a tile
  bool heavy_first;
  Divisor num_m_blocks;             ///< of a sequence; not ragged
  Divisor heads, gqa_ratio;         ///< of a batch entry, as numbered; query heads of a key head
  Divisor section, section_blocks;  ///< heads of a section; not ragged: its tiles
  Divisor last_section;             ///< heads of the last one
  SequenceOrder order;              ///< of a ragged batch
  unsigned* next_tile;  ///< 0 when the first is drawn; null: tile = blockIdx.x + n gridDim.x
  KeyRuns runs;
  RunsTaken taken;  ///< by this launch

  /// No row of the mask is for this launch.
  FLASH_DEVICE bool is_for_none() const {
    return runs.run && taken != RunsTaken::kAll && runs.count[taken == RunsTaken::kWithHoles] == 0;
  }
  FLASH_DEVICE int tiles(const ForwardParams& p) const {
    return order.batch ? order.first_block[p.batch] * heads.value() : num_tiles;
  }
  /// `rank`: of the sequence of the tile before, and then of this one.
  FLASH_DEVICE TileId tile(int index, const ForwardParams& p, int& rank) const {
    int batch, head, m_block;
    if (order.batch) {
      const int num_heads = heads.value();
      while (index < order.first_block[rank] * num_heads) --rank;
      while (index >= order.first_block[rank + 1] * num_heads) ++rank;
      batch = order.batch[rank];
      const int begin = order.first_block[rank], blocks = order.first_block[rank + 1] - begin;
      int within = index - begin * num_heads;
      const int first_head = within / (blocks * section.value()) * section.value();
      within -= first_head * blocks;
      const bool is_last = first_head + section.value() > num_heads;
      const int late = (is_last ? last_section : section).quotient(within);
      m_block = blocks - 1 - late;
      head = first_head + within - late * (is_last ? last_section : section).value();
    } else if (heavy_first) {
      const int first_head = section_blocks.quotient(index) * section.value();
      const int within = section_blocks.remainder(index);
      const Divisor width =
          first_head + section.value() > heads.value() * p.batch ? last_section : section;
      const int late = width.quotient(within);
      m_block = num_m_blocks.value() - 1 - late;
      head = first_head + within - late * width.value();
      batch = heads.quotient(head);
      head -= batch * heads.value();
    } else {
      head = num_m_blocks.quotient(index);
      m_block = index - head * num_m_blocks.value();
      batch = heads.quotient(head);
      head -= batch * heads.value();
    }
    return {m_block, head << log2_heads, batch, index, Sequence::of(p.q_layout, batch)};
  }
  /// The keys of a tile, cut to their run; false if it is not for this launch. Beside other
  /// features the first key keeps its place in the sequence, by which these know it.
  FLASH_DEVICE bool take_keys(TileId& tile, const ForwardParams& p) const {
    int begin = 0, end = IntervalMask::kUnbounded;
    if (runs.run) {
      const KeyRun run = runs.of(tile.batch, tile.head);
      if (taken != RunsTaken::kAll && run.has_holes != (taken == RunsTaken::kWithHoles))
        return false;
      if (taken == RunsTaken::kWhole) begin = run.begin;
      end = run.end;
    }
    tile.k = Sequence::of(p.k_layout, tile.batch);
    tile.diagonal = p.mask.diagonal_offset(tile.q.length, tile.k.length) - begin;
    tile.k.first_row += begin;
    tile.k.length = max(min(tile.k.length, end) - begin, 0);
    return true;
  }
  /// The tile after `index` of this CTA.
  FLASH_DEVICE int after(int index) const {
    return gridDim.x + (next_tile ? int(atomicAdd(next_tile, 1u)) : index);
  }
};

/// Queries whose rows are [row, row + rows) of the heads that share a tile.
FLASH_DEVICE Range queries_of(int log2_heads, int row, int rows) {
  return {row >> log2_heads, (row + rows) >> log2_heads};
}

/// Over the keys of the tile.
FLASH_DEVICE IntervalMask mask_of(const ForwardParams& p, const TileId& tile) {
  return IntervalMask::window(tile.q.length, tile.k.length, tile.diagonal, p.mask.window_left,
                              p.mask.window_right, p.mask.prefix);
}

/// Blocks of keys of some queries, at least one: an empty row still gets out = 0.
///   visit  all blocks, walked from the last to the first
///   full   those that need no mask and in which no row meets its last key: every row has a maximum
///          before the first of them
template <int kBlockN>
FLASH_DEVICE BlockRanges key_blocks(const IntervalMask& mask, Range queries) {
  const Range any = mask.any_keys(queries.begin, queries.end);
  const Range all = mask.all_keys(queries.begin, queries.end);
  if (any.begin >= any.end) return {{0, 1}, {0, 0}};
  const Range visit{any.begin / kBlockN, (any.end + kBlockN - 1) / kBlockN};
  const int full_begin = max(visit.begin, (all.begin + kBlockN - 1) / kBlockN);
  const int full_end = min(visit.end, (max(all.end, 1) - 1) / kBlockN);
  return {visit, {full_begin, max(full_begin, full_end)}};
}

/// The queries of one warpgroup within the tile of the CTA. It leaves out at most kMostSkipped of
/// the blocks above its own last one, as many as its ring of K and V holds beside the V in hand; in
/// the others, and below its own first one, everything is masked.
template <int kBlockN, int kMostSkipped>
FLASH_DEVICE BlockRanges key_blocks_within(const IntervalMask& mask, Range queries, Range tile) {
  static_assert(kMostSkipped >= 1, "the last tile of a head may end after one of its warpgroups");
  const BlockRanges own = key_blocks<kBlockN>(mask, queries);
  const int first_end = max(tile.begin + 1, tile.end - kMostSkipped);
  const int end = max(first_end, min(own.visit.end, tile.end));
  const int full_begin = min(max(own.full.begin, tile.begin), end);
  return {{tile.begin, end}, {full_begin, max(full_begin, min(own.full.end, end))}};
}

}  // namespace flash::cuda::sm90
