// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cuda.h>

#include "attention/platform.h"

namespace flash::cuda::sm90 {

enum class PairKind { kNone, kBias, kMask };

/// A bias or a bool mask whose tiles TMA can bring to shared memory: one tensor of a call, the bias
/// if it can be.
struct PairTiles {
  CUtensorMap map;  ///< coordinates (key, query, head, batch)
  PairKind kind;
};

/// kRows x kCols elements in shared memory: boxes of at most 128 bytes of a row, one after another,
/// in the TMA swizzle whose span is a row of the box (a wider span would space the rows out).
template <class T, int kRows, int kCols>
struct PairTileLayout {
  static constexpr int kPitch = kCols * sizeof(T) < 128 ? kCols * sizeof(T) : 128;
  static_assert(kPitch == 32 || kPitch == 64 || kPitch == 128, "the span of a swizzle");
  static constexpr int kBoxCols = kPitch / sizeof(T), kBoxes = kCols / kBoxCols;
  static constexpr int kBoxBytes = kRows * kPitch;
  static_assert(kCols % kBoxCols == 0 && kRows <= 256, "a box ends with the tile");

  /// Of (row, col) with col < 8, from the start of the tile.
  static FLASH_HOST_DEVICE uint32_t swizzled(int row, int col) {
    const uint32_t linear = row * kPitch + col * sizeof(T);
    return linear ^ (linear >> 7 & (kPitch / 16 - 1)) << 4;
  }
  /// The place `cols` columns, a multiple of 8, to the right.
  static FLASH_HOST_DEVICE uint32_t moved(uint32_t place, int cols) {
    return (place ^ cols % kBoxCols * sizeof(T)) + cols / kBoxCols * kBoxBytes;
  }
};

}  // namespace flash::cuda::sm90
