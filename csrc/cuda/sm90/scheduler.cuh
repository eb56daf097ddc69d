// SPDX-License-Identifier: BSD-3-Clause
// Which tile a CTA does next, and which blocks of keys a tile visits.
#pragma once

#include "cuda/sm90/key_runs.h"
#include "cuda/sm90/traits.cuh"

namespace flash::cuda::sm90 {

/// Tiles that a launch does, by what a mask of keys keeps for them.
enum class RunsTaken { kAll, kWhole, kWithHoles };

/// Tiles are numbered in the order in which they should start.
///   heavy first (causal, ragged): within a section of heads whose K and V share L2, late rows
///     first: they see the most keys, or belong to the longest sequences. Causal against the plain
///     order +31 % at 512 tokens, +21 % at 1k, +44 % at 16k.
///   else: all tiles of a head together.
struct ForwardSchedule {
  int num_m_blocks, num_tiles;
  int section_heads;  ///< query heads of a section
  bool heavy_first;
  unsigned* next_tile;  ///< 0 before and after a launch; null: tile = blockIdx.x + n gridDim.x
  KeyRuns runs;
  RunsTaken taken;  ///< by this launch

  /// The first tile of this CTA; the end at once if no row of the mask is for this launch.
  FLASH_DEVICE int first() const {
    if (!runs.run || taken == RunsTaken::kAll) return blockIdx.x;
    return runs.count[taken == RunsTaken::kWithHoles] > 0 ? blockIdx.x : num_tiles;
  }
  FLASH_DEVICE TileId tile(int index, const ForwardParams& p) const {
    int head, m_block;
    if (heavy_first) {
      const int heads = num_tiles / num_m_blocks;  // of all batches
      const int section = index / (section_heads * num_m_blocks);
      const int within = index - section * section_heads * num_m_blocks;
      const int width = min(section_heads, heads - section * section_heads);
      m_block = num_m_blocks - 1 - within / width;
      head = section * section_heads + within % width;
    } else {
      m_block = index % num_m_blocks;
      head = index / num_m_blocks;
    }
    const int batch = head / p.num_heads;
    return {m_block, head % p.num_heads, batch, index, Sequence::of(p.q_layout, batch)};
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
  /// The tile after `index` of this CTA. Every CTA draws once too often, so the counter wraps to 0.
  FLASH_DEVICE int after(int index) const {
    return next_tile ? gridDim.x + atomicInc(next_tile, num_tiles - 1) : index + gridDim.x;
  }
};

/// Over the keys of the tile.
FLASH_DEVICE IntervalMask mask_of(const ForwardParams& p, const TileId& tile) {
  return IntervalMask::window(tile.q.length, tile.k.length, tile.diagonal, p.mask.window_left,
                              p.mask.window_right, p.mask.prefix);
}

/// Blocks of keys of the rows [row, row + rows), at least one: an empty row still gets out = 0.
///   visit  all blocks, walked from the last to the first
///   full   those that need no mask and in which no row meets its last key: every row has a maximum
///          before the first of them
template <int kBlockN>
FLASH_DEVICE BlockRanges key_blocks(const IntervalMask& mask, int row, int rows) {
  const Range any = mask.any_keys(row, row + rows), all = mask.all_keys(row, row + rows);
  if (any.begin >= any.end) return {{0, 1}, {0, 0}};
  const Range visit{any.begin / kBlockN, (any.end + kBlockN - 1) / kBlockN};
  const int full_begin = max(visit.begin, (all.begin + kBlockN - 1) / kBlockN);
  const int full_end = min(visit.end, (max(all.end, 1) - 1) / kBlockN);
  return {visit, {full_begin, max(full_begin, full_end)}};
}

/// The rows of one warpgroup within the tile of the CTA. It leaves out at most kMostSkipped of the
/// blocks above its own last one, as many as its ring of K and V holds beside the V in hand; in the
/// others, and below its own first one, everything is masked.
template <int kBlockN, int kMostSkipped>
FLASH_DEVICE BlockRanges key_blocks_within(const IntervalMask& mask, int row, Range tile) {
  static_assert(kMostSkipped >= 1, "the last tile of a head may end after one of its warpgroups");
  const BlockRanges own = key_blocks<kBlockN>(mask, row, 64);
  const int first_end = max(tile.begin + 1, tile.end - kMostSkipped);
  const int end = max(first_end, min(own.visit.end, tile.end));
  const int full_begin = min(max(own.full.begin, tile.begin), end);
  return {{tile.begin, end}, {full_begin, max(full_begin, min(own.full.end, end))}};
}

}  // namespace flash::cuda::sm90
