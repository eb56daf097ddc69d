// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <algorithm>

#include "cuda/sm90/divisor.h"

namespace flash::cuda::sm90 {

/// A block of keys or queries of a head, of the heads of all batch entries.
struct HeadBlock {
  int head, block;
};

/// Tiles in the order in which they start: section by section of heads, and in a section one block
/// of all its heads before the next. Sections have equally many heads, but for the last.
class TileOrder {
 public:
  TileOrder() = default;
  /// Sections of `section` heads, the last one of `last`; both at least 1.
  TileOrder(int heads, int blocks, int section, int last)
      : section_(section),
        section_tiles_(std::max(section * blocks, 1)),
        last_(last),
        last_head_(heads - last),
        last_tile_((heads - last) * blocks) {}

  FLASH_HOST_DEVICE HeadBlock at(int tile) const {
    const bool is_last = tile >= last_tile_;
    const int number = section_tiles_.quotient(tile);
    const int first = is_last ? last_head_ : number * section_.value();
    const int within = tile - (is_last ? last_tile_ : number * section_tiles_.value());
    const Divisor width = is_last ? last_ : section_;
    const int block = width.quotient(within);
    return {first + within - block * width.value(), block};
  }

 private:
  Divisor section_, section_tiles_, last_;
  int last_head_ = 0, last_tile_ = 0;
};

}  // namespace flash::cuda::sm90
