// SPDX-License-Identifier: BSD-3-Clause
// Tiles between global and shared memory, by all threads of a CTA. Rows and columns outside the
// matrix are zeros in shared memory and are not written to global memory.
#pragma once

#include "primitives/ptx/cp_async.cuh"
#include "primitives/tile/register_tile.cuh"
#include "primitives/tile/shared_tile.cuh"

namespace flash {

/// A row-major matrix in global memory; its columns are contiguous.
template <class Element>
struct GlobalMatrix {
  Element* data;
  int64_t row_stride;
  int rows, cols;
  bool in_chunks;  ///< every row starts at a multiple of 16 bytes and cols is a multiple of 8
};

/// Which chunks of a tile a thread moves: a group of 4 or 8 lanes takes neighbouring chunks of a
/// row. A thread's rows differ by a multiple of 8, so one swizzle key serves them all.
template <class Tile, int kNumThreads>
struct ChunkMap {
  static constexpr int kLanes = Tile::kChunks % 8 == 0 ? 8 : 4;
  static constexpr int kRowStep = kNumThreads / kLanes;
  static_assert(kRowStep % 8 == 0 && Tile::kRows % kRowStep == 0, "threads share the rows evenly");

  static FLASH_DEVICE int first_row() { return threadIdx.x / kLanes; }
  static FLASH_DEVICE int first_chunk() { return threadIdx.x % kLanes; }
};

/// Eight elements one by one, for rows that are not aligned or end within a chunk.
template <class Element>
FLASH_DEVICE uint4 load_elements(const Element* source, int count) {
  uint16_t bits[8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    bits[i] = i < count ? reinterpret_cast<const uint16_t*>(source)[i] : uint16_t(0);
  const auto word = [&](int i) { return uint32_t(bits[i]) | uint32_t(bits[i + 1]) << 16; };
  return {word(0), word(2), word(4), word(6)};
}

/// Rows [first_row, first_row + Tile::kRows) of a matrix into a tile, by cp.async where the matrix
/// comes in chunks (the caller commits and waits). keeps_row(row) false: the row reads as zeros.
template <int kNumThreads, class Tile, class Matrix, class KeepsRow>
FLASH_DEVICE void load_tile(Tile tile, const Matrix& matrix, int first_row, KeepsRow keeps_row) {
  using Map = ChunkMap<Tile, kNumThreads>;
  const int own_row = Map::first_row(), own_chunk = Map::first_chunk();
  const uint32_t place = tile.address(own_row, own_chunk);
  const int first_col = own_chunk * Tile::kChunkElements;
  int row = first_row + own_row;
  const auto* source = matrix.data + row * matrix.row_stride + first_col;
  if (matrix.in_chunks) {
#pragma unroll
    for (int rows = 0; rows < Tile::kRows; rows += Map::kRowStep) {
      const bool row_is_kept = row < matrix.rows && keeps_row(row);
#pragma unroll
      for (int chunks = 0; chunks < Tile::kChunks; chunks += Map::kLanes) {
        const int cols = chunks * Tile::kChunkElements;
        cp_async_16(Tile::moved(place, rows, chunks), source + cols,
                    row_is_kept && first_col + cols < matrix.cols);
      }
      row += Map::kRowStep;
      source += Map::kRowStep * matrix.row_stride;
    }
  } else {
#pragma unroll 1
    for (int rows = 0; rows < Tile::kRows; rows += Map::kRowStep) {
      const bool row_is_kept = row < matrix.rows && keeps_row(row);
#pragma unroll 1
      for (int chunks = 0; chunks < Tile::kChunks; chunks += Map::kLanes) {
        const int cols = chunks * Tile::kChunkElements;
        store_shared(
            Tile::moved(place, rows, chunks),
            load_elements(source + cols, row_is_kept ? matrix.cols - first_col - cols : 0));
      }
      row += Map::kRowStep;
      source += Map::kRowStep * matrix.row_stride;
    }
  }
}

/// A rounded accumulator into a tile: its element (0, 0) goes to (first_row, first_col), and its
/// blocks of 16 columns stand kStride blocks apart.
template <int kStride = 1, class Element, int kRows, int kCols, class Tile>
FLASH_DEVICE void store_operand(const RegisterOperand<Element, kRows, kCols>& operand, Tile tile,
                                int first_row, int first_col) {
  // A lane's pair of columns lies within a chunk, at the same byte in every m16n8 tile.
  const uint32_t place = tile.address(first_row + lane_row(), 0) + lane_col() * sizeof(Element);
#pragma unroll
  for (int m = 0; m < operand.kTilesM; ++m)
#pragma unroll
    for (int k = 0; k < operand.kStepsK; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int chunk = first_col / Tile::kChunkElements + 2 * kStride * k + i / 2;
        store_shared(Tile::moved(place, 16 * m + 8 * (i % 2), chunk), operand.at[m][k][i]);
      }
}
template <int kStride = 1, int kRows, int kCols, class Tile>
FLASH_DEVICE void round_to_tile(const RegisterTile<kRows, kCols>& accumulator, Tile tile,
                                int first_row, int first_col) {
  store_operand<kStride>(to_operand<typename Tile::Element>(accumulator), tile, first_row,
                         first_col);
}

/// A tile into rows [first_row, ...) of a matrix.
template <int kNumThreads, class Tile, class Matrix>
FLASH_DEVICE void store_tile(Tile tile, const Matrix& matrix, int first_row) {
  using Map = ChunkMap<Tile, kNumThreads>;
  const uint32_t place = tile.address(Map::first_row(), Map::first_chunk());
  for (int rows = 0; rows < Tile::kRows; rows += Map::kRowStep) {
    const int row = first_row + Map::first_row() + rows;
    if (row >= matrix.rows) return;
#pragma unroll
    for (int chunks = 0; chunks < Tile::kChunks; chunks += Map::kLanes) {
      const int col = (Map::first_chunk() + chunks) * Tile::kChunkElements;
      const uint4 x = load_shared(Tile::moved(place, rows, chunks));
      auto* const target = matrix.data + row * matrix.row_stride + col;
      if (matrix.in_chunks) {
        if (col < matrix.cols) *reinterpret_cast<uint4*>(target) = x;
      } else {
        const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < Tile::kChunkElements; ++i)
          if (col + i < matrix.cols)
            reinterpret_cast<uint16_t*>(target)[i] = uint16_t(words[i / 2] >> 16 * (i % 2));
      }
    }
  }
}

}  // namespace flash
