// SPDX-License-Identifier: BSD-3-Clause
// Products of tiles on CUDA cores, for float and double.
//
// A CTA of 8 warps holds a tile of kRows x kCols in registers. Warp w owns the rows
// [w kRows / 8, (w + 1) kRows / 8) whole, so that sums and maxima along a row stay in one warp. Its
// 32 lanes form 4 row lanes x 8 column lanes; a lane holds kVec neighbouring rows (kVec reals are
// 16 bytes) and, in every group of 8 kVec columns, kVec neighbouring ones:
//
//   row(i) = (4 warp + row_lane) kVec + i            i < kVec
//   col(j) = j / kVec 8 kVec + col_lane kVec + j % kVec    j < kCols / 8
//
// Both operands of an outer product step lie in shared memory with the inner index outermost,
// A[k][row] and B[k][col], and are read 16 bytes at a time. The row lane is made of bits 0 and 4 of
// the lane, the column lane of bits 1 to 3: then lanes that share 16 bytes are neighbours (lane ^ 1
// or lane ^ 2), as an interleaved lane layout has it for reads of 16 bytes to be merged.
//
// The inner index is walked in chunks of kDepth through two stages of shared memory: the next chunk
// travels from global memory to registers while this one is multiplied, one barrier a chunk.
#pragma once

#include <type_traits>

#include "primitives/numeric.cuh"

namespace flash {

template <class Real>
struct FmaTile {
  static constexpr int kThreads = 256, kWarps = 8, kRowLanes = 4, kColLanes = 8;
  static constexpr int kVec = 16 / sizeof(Real);
  static constexpr int kRows = kWarps * kRowLanes * kVec;
  static constexpr int kDepth = 16;
  /// Pitch of a row of A in shared memory; the padding spreads transposed stores over the banks.
  static constexpr int kRowPitch = kRows + kVec;

  using Vector = AlignedArray<Real, kVec>;
  template <int kCols>
  using Registers = Real[kVec][kCols / kColLanes];

  static FLASH_DEVICE int first_row() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    return (warp * kRowLanes + (lane & 1) + (lane >> 4) * 2) * kVec;
  }
  static FLASH_DEVICE int first_col() { return (threadIdx.x / 2) % 8 * kVec; }
  static FLASH_DEVICE int row(int i) { return first_row() + i; }
  static FLASH_DEVICE int col(int j) {
    return first_col() + j / kVec * (kColLanes * kVec) + j % kVec;
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

struct AllRows {
  FLASH_DEVICE bool operator()(int) const { return true; }
};

/// Rows of a matrix in global memory. What lies outside of it, and rows that `keep` refuses, read
/// as 0 without being loaded.
template <class Real, class Element_, class Keep = AllRows>
struct MatrixRows {
  using Element = Element_;
  using Vector = typename FmaTile<Real>::Vector;
  static constexpr int kVec = FmaTile<Real>::kVec;

  const Element* data;
  int64_t row_stride;
  int rows, width;
  bool aligned;  ///< a vector of a row lies inside or outside as a whole, and is one load
  Keep keep;

  FLASH_DEVICE MatrixRows(const void* start, int64_t offset, int64_t stride, int rows, int width,
                          Keep keep = {})
      : data(static_cast<const Element*>(start) + offset),
        row_stride(stride),
        rows(rows),
        width(width),
        aligned(width % kVec == 0 && rows_are_aligned<kVec>(data, stride)),
        keep(keep) {}

  /// Null where the row reads as 0.
  FLASH_DEVICE const Element* row_start(int row) const {
    return row < rows && keep(row) ? data + row * row_stride : nullptr;
  }
  /// Elements col .. col + kVec - 1 of the row that starts there.
  FLASH_DEVICE Vector fetch(const Element* start, int col) const {
    Vector result{};
    if (!start || col >= width) return result;
    if (aligned) {
      const auto loaded = *reinterpret_cast<const AlignedArray<Element, kVec>*>(start + col);
#pragma unroll
      for (int e = 0; e < kVec; ++e) result.x[e] = widen(loaded.x[e]);
    } else {
#pragma unroll
      for (int e = 0; e < kVec; ++e)
        if (col + e < width) result.x[e] = widen(start[col + e]);
    }
    return result;
  }
};

/// Two stages of chunks. One object serves all products of a kernel, one after another: a product
/// starts in the stage that its predecessor did not read last.
template <class Real, int kMaxCols>
struct FmaStages {
  using Tile = FmaTile<Real>;
  static constexpr int kColPitch = kMaxCols + Tile::kVec;
  Real a[2][Tile::kDepth][Tile::kRowPitch];
  Real b[2][Tile::kDepth][kColPitch];
};

struct Unchanged {
  template <class Real>
  FLASH_DEVICE Real operator()(Real x) const {
    return x;
  }
};

/// acc += sum over kk < kDepth of of_a(a[kk][row]) b[kk][col]; a and b point at the thread's first
/// row and column.
template <int kPitchA, int kPitchB, class Real, int kRowCount, int kColCount, class OfA = Unchanged>
FLASH_DEVICE void fma_chunk(Real (&acc)[kRowCount][kColCount], const Real* a, const Real* b,
                            OfA of_a = {}) {
  using Tile = FmaTile<Real>;
  using Vector = typename Tile::Vector;
  constexpr int kVec = Tile::kVec;
#pragma unroll
  for (int kk = 0; kk < Tile::kDepth; ++kk) {
    Vector row = *reinterpret_cast<const Vector*>(a + kk * kPitchA);
#pragma unroll
    for (int i = 0; i < kVec; ++i) row.x[i] = of_a(row.x[i]);
#pragma unroll
    for (int group = 0; group < kColCount / kVec; ++group) {
      const Vector col =
          *reinterpret_cast<const Vector*>(b + kk * kPitchB + group * Tile::kColLanes * kVec);
#pragma unroll
      for (int i = 0; i < kVec; ++i)
#pragma unroll
        for (int e = 0; e < kVec; ++e) acc[i][group * kVec + e] += row.x[i] * col.x[e];
    }
  }
}

/// A chunk of kRowCount rows x kDepth columns on its way from global memory into a stage, where it
/// lies transposed. Eight rows and four vectors of a row are neighbours in a warp: whole sectors
/// are read, and the stores meet in no more than two rows of a bank.
template <class Real, class Element, int kRowCount>
struct TransposedChunk {
  using Tile = FmaTile<Real>;
  static constexpr int kVectorsPerRow = Tile::kDepth / Tile::kVec;
  static constexpr int kPerThread = kRowCount * kVectorsPerRow / Tile::kThreads;
  static_assert(kRowCount * kVectorsPerRow % Tile::kThreads == 0, "every thread moves as much");

  const Element* starts[kPerThread];
  typename Tile::Vector vectors[kPerThread];

  template <class Source>
  FLASH_DEVICE TransposedChunk(const Source& source, int first_row) {
#pragma unroll
    for (int n = 0; n < kPerThread; ++n)
      starts[n] = source.row_start(first_row + index(n) / kVectorsPerRow);
  }
  static FLASH_DEVICE int index(int n) { return n * Tile::kThreads + threadIdx.x; }
  template <class Source>
  FLASH_DEVICE void fetch(const Source& source, int first_col) {
#pragma unroll
    for (int n = 0; n < kPerThread; ++n)
      vectors[n] = source.fetch(starts[n], first_col + index(n) % kVectorsPerRow * Tile::kVec);
  }
  template <int kPitch>
  FLASH_DEVICE void store(Real (&stage)[Tile::kDepth][kPitch]) const {
#pragma unroll
    for (int n = 0; n < kPerThread; ++n)
#pragma unroll
      for (int e = 0; e < Tile::kVec; ++e)
        stage[index(n) % kVectorsPerRow * Tile::kVec + e][index(n) / kVectorsPerRow] =
            vectors[n].x[e];
  }
};

/// A chunk of kDepth rows x kColCount columns, stored as it is read.
template <class Real, int kColCount>
struct StraightChunk {
  using Tile = FmaTile<Real>;
  static constexpr int kVectorsPerRow = kColCount / Tile::kVec;
  static constexpr int kPerThread = Tile::kDepth * kVectorsPerRow / Tile::kThreads;
  static_assert(Tile::kDepth * kVectorsPerRow % Tile::kThreads == 0, "every thread moves as much");

  typename Tile::Vector vectors[kPerThread];

  template <class Source>
  FLASH_DEVICE void fetch(const Source& source, int first_row, int first_col) {
#pragma unroll
    for (int n = 0; n < kPerThread; ++n) {
      const int index = n * Tile::kThreads + threadIdx.x;
      vectors[n] = source.fetch(source.row_start(first_row + index / kVectorsPerRow),
                                first_col + index % kVectorsPerRow * Tile::kVec);
    }
  }
  template <int kPitch>
  FLASH_DEVICE void store(Real (&stage)[Tile::kDepth][kPitch]) const {
#pragma unroll
    for (int n = 0; n < kPerThread; ++n) {
      const int index = n * Tile::kThreads + threadIdx.x;
      *reinterpret_cast<typename Tile::Vector*>(
          &stage[index / kVectorsPerRow][index % kVectorsPerRow * Tile::kVec]) = vectors[n];
    }
  }
};

/// acc (kRows x kCols) += A B^T over `depth` columns, A = rows of `a` from a_row on, B = rows of
/// `b` from b_row on.
template <int kCols, class Real, int kMaxCols, class SourceA, class SourceB>
FLASH_DEVICE void product_abt(Real (&acc)[FmaTile<Real>::kVec][kCols / 8],
                              FmaStages<Real, kMaxCols>& stages, int& stage, const SourceA& a,
                              int a_row, const SourceB& b, int b_row, int depth) {
  using Tile = FmaTile<Real>;
  if (depth <= 0) return;
  TransposedChunk<Real, typename SourceA::Element, Tile::kRows> next_a(a, a_row);
  TransposedChunk<Real, typename SourceB::Element, kCols> next_b(b, b_row);
  next_a.fetch(a, 0);
  next_b.fetch(b, 0);
#pragma unroll 1
  for (int k = 0; k < depth; k += Tile::kDepth) {
    next_a.store(stages.a[stage]);
    next_b.store(stages.b[stage]);
    __syncthreads();
    if (k + Tile::kDepth < depth) {
      next_a.fetch(a, k + Tile::kDepth);
      next_b.fetch(b, k + Tile::kDepth);
    }
    fma_chunk<Tile::kRowPitch, FmaStages<Real, kMaxCols>::kColPitch>(
        acc, &stages.a[stage][0][Tile::first_row()], &stages.b[stage][0][Tile::first_col()]);
    stage ^= 1;
  }
}

/// A tile that a warp wrote from its registers and reads as the operand A of the next product:
/// tile[col][row]. Only rows of the warp's own are touched, so a warp barrier is enough.
template <class Real, int kCols>
struct FmaExchange {
  using Tile = FmaTile<Real>;
  Real tile[kCols][Tile::kRowPitch];

  /// value(i, j) is what the thread holds for its row i and column j.
  template <class Value>
  FLASH_DEVICE void write(Value value) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
      typename Tile::Vector rows;
#pragma unroll
      for (int i = 0; i < Tile::kVec; ++i) rows.x[i] = value(i, j);
      *reinterpret_cast<typename Tile::Vector*>(&tile[Tile::col(j)][Tile::first_row()]) = rows;
    }
    __syncwarp();
  }
  /// value(i, j, what the thread wrote there)
  template <class Value>
  FLASH_DEVICE void update(Value value) {
    write([&](int i, int j) { return value(i, j, tile[Tile::col(j)][Tile::row(i)]); });
  }
  /// The same as a loop over the columns, for a `value` of many instructions; it may not index
  /// registers by j.
  template <class Value>
  FLASH_DEVICE void update_in_loop(Value value) {
    __syncwarp();
#pragma unroll 1
    for (int j = 0; j < kCols / 8; ++j) {
      auto& own = *reinterpret_cast<typename Tile::Vector*>(&tile[Tile::col(j)][Tile::first_row()]);
      typename Tile::Vector rows = own;
#pragma unroll
      for (int i = 0; i < Tile::kVec; ++i) rows.x[i] = value(i, j, rows.x[i]);
      own = rows;
    }
    __syncwarp();
  }
  /// What the thread wrote, back in its registers.
  FLASH_DEVICE void read(Real (&registers)[Tile::kVec][kCols / 8]) const {
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
      const auto rows =
          *reinterpret_cast<const typename Tile::Vector*>(&tile[Tile::col(j)][Tile::first_row()]);
#pragma unroll
      for (int i = 0; i < Tile::kVec; ++i) registers[i][j] = rows.x[i];
    }
  }
};

/// The tile as the other operand, tile[row][col], for all warps: barriers are the caller's.
template <class Real, int kCols>
struct FmaTranspose {
  using Tile = FmaTile<Real>;
  static constexpr int kPitch = kCols + Tile::kVec;
  Real tile[Tile::kRows][kPitch];

  template <class Value>
  FLASH_DEVICE void write(Value value) {
#pragma unroll
    for (int i = 0; i < Tile::kVec; ++i)
#pragma unroll
      for (int j = 0; j < kCols / 8; j += Tile::kVec) {
        typename Tile::Vector cols;
#pragma unroll
        for (int e = 0; e < Tile::kVec; ++e) cols.x[e] = value(i, j + e);
        *reinterpret_cast<typename Tile::Vector*>(&tile[Tile::row(i)][Tile::col(j)]) = cols;
      }
  }
};

/// acc (kRows x kPanel) += of_a(A) B, A[k][row] in shared memory, B = rows [b_row, b_row + kInner)
/// of `b`, columns from b_col on.
template <int kPanel, class Real, int kInner, int kMaxCols, class Source, class OfA = Unchanged>
FLASH_DEVICE void product_ab(Real (&acc)[FmaTile<Real>::kVec][kPanel / 8],
                             const Real (&a)[kInner][FmaTile<Real>::kRowPitch],
                             FmaStages<Real, kMaxCols>& stages, int& stage, const Source& b,
                             int b_row, int b_col, OfA of_a = {}) {
  using Tile = FmaTile<Real>;
  const int depth = min(kInner, b.rows - b_row);
  StraightChunk<Real, kPanel> next;
  next.fetch(b, b_row, b_col);
#pragma unroll 1
  for (int k = 0; k < depth; k += Tile::kDepth) {
    next.store(stages.b[stage]);
    __syncthreads();
    if (k + Tile::kDepth < depth) next.fetch(b, b_row + k + Tile::kDepth, b_col);
    fma_chunk<Tile::kRowPitch, FmaStages<Real, kMaxCols>::kColPitch>(
        acc, &a[k][Tile::first_row()], &stages.b[stage][0][Tile::first_col()], of_a);
    stage ^= 1;
  }
}

/// acc (kRows x kCols) += A^T B, A = rows [a_row, a_row + kInner) of `a`, its first kRows columns,
/// B[k][col] in shared memory.
template <int kCols, class Real, int kInner, int kPitch, int kMaxCols, class Source>
FLASH_DEVICE void product_atb(Real (&acc)[FmaTile<Real>::kVec][kCols / 8], const Source& a,
                              int a_row, FmaStages<Real, kMaxCols>& stages, int& stage,
                              const Real (&b)[kInner][kPitch]) {
  using Tile = FmaTile<Real>;
  const int depth = min(kInner, a.rows - a_row);
  StraightChunk<Real, Tile::kRows> next;
  next.fetch(a, a_row, 0);
#pragma unroll 1
  for (int k = 0; k < depth; k += Tile::kDepth) {
    next.store(stages.a[stage]);
    __syncthreads();
    if (k + Tile::kDepth < depth) next.fetch(a, a_row + k + Tile::kDepth, 0);
    fma_chunk<Tile::kRowPitch, kPitch>(acc, &stages.a[stage][0][Tile::first_row()],
                                       &b[k][Tile::first_col()]);
    stage ^= 1;
  }
}

/// Writes rows [first_row, first_row + kRows) and columns [first_col, first_col + kPanel) of a
/// matrix, where they lie inside; value(i, j) is what the thread holds for its row i and column j.
template <int kPanel, class Real, class Element, class Value>
FLASH_DEVICE void store_rows(Element* data, int64_t row_stride, int rows, int width, int first_row,
                             int first_col, Value value) {
  using Tile = FmaTile<Real>;
  constexpr int kVec = Tile::kVec;
  const bool aligned = rows_are_aligned<kVec>(data, row_stride);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
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
