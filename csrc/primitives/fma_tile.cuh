// SPDX-License-Identifier: BSD-3-Clause
// A tile of a product on CUDA cores, for float and double: who holds what, in registers and in
// shared memory. fma_product.cuh multiplies.
//
// A CTA of kWarps warps holds a tile of kRows x kCols in registers. Warp w owns kRows / kWarps
// neighbouring rows whole, so that sums and maxima along a row stay in one warp. Its 32 lanes form
// 4 row lanes x 8 column lanes; a lane holds kVec neighbouring rows (kVec reals are 16 bytes) of
// every group of 4 kVec, and kVec neighbouring columns of every group of 8 kVec:
//
//   row(i) = warp kRows / kWarps + i / kVec 4 kVec + row_lane kVec + i % kVec    i < kThreadRows
//   col(j) = j / kVec 8 kVec + col_lane kVec + j % kVec                          j < kCols / 8
//
// Both operands of an outer product step lie in shared memory with the inner index outermost,
// A[k][row] and B[k][col], and are read 16 bytes at a time. The row lane is made of bits 0 and 4 of
// the lane, the column lane of bits 1 to 3: then lanes that share 16 bytes are neighbours (lane ^ 1
// or lane ^ 2), as an interleaved lane layout has it for reads of 16 bytes to be merged.
#pragma once

#include "primitives/numeric.cuh"

namespace flash {

template <class Real_, int kWarps_ = 8, int kRowVectors = 1>
struct FmaTile {
  using Real = Real_;
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps, kRowLanes = 4, kColLanes = 8;
  static constexpr int kVec = 16 / sizeof(Real), kThreadRows = kRowVectors * kVec;
  static constexpr int kRows = kWarps * kRowLanes * kThreadRows;
  /// Of a chunk of the inner index.
  static constexpr int kDepth = 16;

  using Vector = AlignedArray<Real, kVec>;
  template <int kCols>
  using Registers = Real[kThreadRows][kCols / kColLanes];

  static FLASH_DEVICE int first_row() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    return warp * (kRowLanes * kThreadRows) + ((lane & 1) + (lane >> 4) * 2) * kVec;
  }
  static FLASH_DEVICE int first_col() { return (threadIdx.x / 2) % 8 * kVec; }
  static FLASH_DEVICE int row(int i) {
    return first_row() + i / kVec * (kRowLanes * kVec) + i % kVec;
  }
  static FLASH_DEVICE int col(int j) {
    return first_col() + j / kVec * (kColLanes * kVec) + j % kVec;
  }

  // What there is one of per row is kept by one of the 8 column lanes that share the row, or by
  // kKeepers neighbouring ones alike: column lane c keeps that of the thread's row c / kKeepers.
  static constexpr int kKeepers = kColLanes / kThreadRows;
  static_assert(kThreadRows <= kColLanes, "a lane keeps one row");
  static FLASH_DEVICE int kept_row() { return row((threadIdx.x / 2) % 8 / kKeepers); }
  static FLASH_DEVICE bool is_first_keeper() { return (threadIdx.x / 2) % kKeepers == 0; }
  /// What the keeper of the thread's row i holds.
  static FLASH_DEVICE Real from_keeper(Real kept, int i) {
    return __shfl_sync(0xffffffffu, kept, (threadIdx.x & 17) | i * kKeepers * 2);
  }
  /// Combines x[i] over the lanes that share row i, for its keepers. A step halves the rows that a
  /// lane still works for: 7 exchanges for 8 rows, not 24.
  template <class Combine>
  static FLASH_DEVICE Real reduce_to_keeper(Real (&x)[kThreadRows], Combine combine) {
    int count = kThreadRows;
#pragma unroll
    for (int mask = 8; mask >= 2; mask /= 2) {
      count /= 2;
      const bool upper = threadIdx.x & mask;
      if (count > 0) {
#pragma unroll
        for (int i = 0; i < count; ++i) {
          const Real kept = upper ? x[i + count] : x[i], sent = upper ? x[i] : x[i + count];
          x[i] = combine(kept, __shfl_xor_sync(0xffffffffu, sent, mask));
        }
      } else {
        x[0] = combine(x[0], __shfl_xor_sync(0xffffffffu, x[0], mask));
      }
    }
    return x[0];
  }
};

template <class Real, int kRowCount, int kColCount>
FLASH_DEVICE void fill_registers(Real (&tile)[kRowCount][kColCount], Real x) {
#pragma unroll
  for (int i = 0; i < kRowCount; ++i)
#pragma unroll
    for (int j = 0; j < kColCount; ++j) tile[i][j] = x;
}

/// Combines x over the 8 column lanes that share a row; every lane gets the result.
template <class Real, class Combine>
FLASH_DEVICE Real reduce_row(Real x, Combine combine) {
#pragma unroll
  for (int mask = 2; mask <= 8; mask *= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, mask));
  return x;
}

/// Where [k][index] of an operand lies: rows of kWidth, and kPad more reals after every kVec rows.
/// The padding is for vectors along k that arrive transposed. One store instruction takes element e
/// of kDepth / kVec vectors of some neighbouring rows: k = kVec v + e. All rows begin in the same
/// bank, so vector v would meet vector 0; the padding moves it by as many banks as it needs.
template <class Tile, int kWidth_, int kPad>
struct OperandLayout {
  static constexpr int kWidth = kWidth_;
  static_assert(kWidth * sizeof(typename Tile::Real) % 128 == 0, "rows begin in the same bank");
  static constexpr int offset(int k) { return k * kWidth + k / Tile::kVec * kPad; }
};
template <class Tile, int kWidth>
using SpreadLayout =
    OperandLayout<Tile, kWidth, 128 / int(sizeof(typename Tile::Real)) * Tile::kVec / Tile::kDepth>;
/// For what is written once, where the bytes count.
template <class Tile, int kWidth>
using DenseLayout = OperandLayout<Tile, kWidth, 0>;

/// kDepth_ rows of an operand in shared memory.
template <class Layout_, class Real, int kDepth_>
struct alignas(16) FmaOperand {
  using Layout = Layout_;
  static constexpr int kDepth = kDepth_;
  Real data[Layout::offset(kDepth)];

  FLASH_DEVICE Real* at(int k, int index) { return data + Layout::offset(k) + index; }
  FLASH_DEVICE const Real* at(int k, int index) const { return data + Layout::offset(k) + index; }
};

/// A tile that a warp wrote from its registers and reads as the operand A of the next product:
/// [col][row]. Only rows of the warp's own are touched, so a warp barrier is enough.
template <class Tile, int kCols>
struct FmaExchange : FmaOperand<SpreadLayout<Tile, Tile::kRows>, typename Tile::Real, kCols> {
  using Real = typename Tile::Real;
  using Vector = typename Tile::Vector;
  static constexpr int kVec = Tile::kVec, kGroups = Tile::kThreadRows / kVec;

  FLASH_DEVICE Vector& own(int j, int group) {
    return *reinterpret_cast<Vector*>(this->at(Tile::col(j), Tile::row(group * kVec)));
  }
  /// value(i, j) is what the thread holds for its row i and column j.
  template <class Value>
  FLASH_DEVICE void write(Value value) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        Vector rows;
#pragma unroll
        for (int e = 0; e < kVec; ++e) rows.x[e] = value(group * kVec + e, j);
        own(j, group) = rows;
      }
    __syncwarp();
  }
  /// value(i, j, what the thread wrote there)
  template <class Value>
  FLASH_DEVICE void update(Value value) {
    write([&](int i, int j) { return value(i, j, *this->at(Tile::col(j), Tile::row(i))); });
  }
  /// The same as a loop over the columns, for a `value` of many instructions; it may not index
  /// registers by j.
  template <class Value>
  FLASH_DEVICE void update_in_loop(Value value) {
    __syncwarp();
#pragma unroll 1
    for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        Vector rows = own(j, group);
#pragma unroll
        for (int e = 0; e < kVec; ++e) rows.x[e] = value(group * kVec + e, j, rows.x[e]);
        own(j, group) = rows;
      }
    __syncwarp();
  }
  /// What the thread wrote, back in its registers.
  FLASH_DEVICE void read(Real (&registers)[Tile::kThreadRows][kCols / 8]) {
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const Vector rows = own(j, group);
#pragma unroll
        for (int e = 0; e < kVec; ++e) registers[group * kVec + e][j] = rows.x[e];
      }
  }
};

/// The tile as the other operand, [row][col], for all warps: barriers are the caller's.
template <class Tile, int kCols>
struct FmaTranspose {
  static constexpr int kPitch = kCols + Tile::kVec;
  struct Layout {
    static constexpr int offset(int k) { return k * kPitch; }
  };
  static constexpr int kDepth = Tile::kRows;
  alignas(16) typename Tile::Real data[kDepth * kPitch];

  FLASH_DEVICE typename Tile::Real* at(int k, int index) { return data + k * kPitch + index; }
  FLASH_DEVICE const typename Tile::Real* at(int k, int index) const {
    return data + k * kPitch + index;
  }
  template <class Value>
  FLASH_DEVICE void write(Value value) {
#pragma unroll
    for (int i = 0; i < Tile::kThreadRows; ++i)
#pragma unroll
      for (int j = 0; j < kCols / 8; j += Tile::kVec) {
        typename Tile::Vector cols;
#pragma unroll
        for (int e = 0; e < Tile::kVec; ++e) cols.x[e] = value(i, j + e);
        *reinterpret_cast<typename Tile::Vector*>(at(Tile::row(i), Tile::col(j))) = cols;
      }
  }
};

/// Writes rows [first_row, first_row + kRows) and columns [first_col, first_col + kPanel) of a
/// matrix, where they lie inside; value(i, j) is what the thread holds for its row i and column j.
template <class Tile, int kPanel, class Element, class Value>
FLASH_DEVICE void store_rows(Element* data, int64_t row_stride, int rows, int width, int first_row,
                             int first_col, Value value) {
  constexpr int kVec = Tile::kVec;
  const bool aligned = rows_are_aligned<kVec>(data, row_stride);
#pragma unroll
  for (int i = 0; i < Tile::kThreadRows; ++i) {
    const int row = first_row + Tile::row(i);
    if (row >= rows) continue;
#pragma unroll
    for (int j = 0; j < kPanel / 8; j += kVec) {
      const int col = first_col + Tile::col(j);
      Element* at = data + row * row_stride + col;
      AlignedArray<Element, kVec> packed;
#pragma unroll
      for (int e = 0; e < kVec; ++e) packed.x[e] = narrow<Element>(value(i, j + e));
      if (aligned && col + kVec <= width) {
        *reinterpret_cast<AlignedArray<Element, kVec>*>(at) = packed;
      } else {
#pragma unroll
        for (int e = 0; e < kVec; ++e)
          if (col + e < width) at[e] = packed.x[e];
      }
    }
  }
}

}  // namespace flash
