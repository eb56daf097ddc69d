// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "primitives/device.cuh"

namespace flash {

FLASH_DEVICE void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
FLASH_DEVICE void store_shared(uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}
FLASH_DEVICE uint4 load_shared(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

/// A row-major matrix of 16-bit elements in shared memory, in chunks of 16 bytes. Chunk c of row r
/// lies at place c ^ key(r), so that the eight rows of an ldmatrix, and the eight chunks of a row,
/// fall into different banks:
///   rows of 128 n bytes:       key = r % 8
///   rows of 128 n + 64 bytes:  key = r / 2 % 4 (two neighbours already differ by 64 bytes)
/// Rows that differ by a multiple of 8 have the same key: an address is a lane's own place, one
/// exclusive or, and constants.
template <class Element_, int kRows_, int kCols_>
struct SharedTile {
  using Element = Element_;
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kChunkElements = 8, kChunkBytes = 16;
  static constexpr int kChunks = kCols / kChunkElements;
  static constexpr int kPitch = kChunks * kChunkBytes;
  static constexpr int kKeyMask = kChunks % 8 == 0 ? 7 : 3;
  static_assert(sizeof(Element) == 2, "a chunk holds eight 16-bit elements");
  static_assert(kChunks % 4 == 0, "rows are whole halves of the 128 bytes that all banks serve");
  static_assert(kRows % 8 == 0, "ldmatrix reads eight rows");

  uint32_t base;  ///< a multiple of 128

  FLASH_DEVICE explicit SharedTile(const Element* storage) : base(shared_address(storage)) {}

  static FLASH_DEVICE int key(int row) { return kKeyMask == 7 ? row & 7 : row >> 1 & 3; }
  FLASH_DEVICE uint32_t address(int row, int chunk) const {
    return base + row * kPitch + (chunk ^ key(row)) * kChunkBytes;
  }
  /// address(row + rows, chunk ^ chunks) of a place = address(row, chunk), where rows is a multiple
  /// of 8 and chunk + chunks = chunk ^ chunks.
  static FLASH_DEVICE uint32_t moved(uint32_t place, int rows, int chunks) {
    return (place ^ (chunks & kKeyMask) * kChunkBytes) + (chunks & ~kKeyMask) * kChunkBytes +
           rows * kPitch;
  }
};

}  // namespace flash
