// SPDX-License-Identifier: BSD-3-Clause
// Products of tiles on CUDA cores. What is not in shared memory yet is streamed from global memory:
// the inner index is walked in chunks of kDepth through two stages of shared memory. The next chunk
// is on its way while this one is multiplied, one barrier a chunk. It travels through registers, or
// asynchronously past them: transposed, that takes a copy for each element, and it pays where
// registers are what a kernel lacks.
//
// A thread of r x c elements makes r c FMAs of (r + c) / kVec reads of 16 bytes. Of fp32, four
// warps issue their FMAs in r c cycles, one to each quarter of a multiprocessor, while a read
// occupies the one shared memory for two: 4 x 16 keeps it busy for 40 of 64 cycles, 8 x 8 for 32 of
// 64 and 8 x 16 for 48 of 128.
#pragma once

#include <type_traits>

#include "primitives/fma_tile.cuh"
#include "primitives/ptx/cp_async.cuh"

namespace flash {

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
  /// Elements are what shared memory holds: they need not come through registers.
  static constexpr bool kUnconverted = std::is_same_v<Element, Real>;

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

  FLASH_DEVICE bool has_row(int row) const { return row < rows && keep(row); }
  /// kVec elements from `at` on, the first `left` of them; left <= 0: none.
  template <bool kAligned>
  FLASH_DEVICE Vector load(const Element* at, int left) const {
    Vector result{};
    if constexpr (kAligned) {
      if (left > 0) {
        const auto loaded = *reinterpret_cast<const AlignedArray<Element, kVec>*>(at);
#pragma unroll
        for (int e = 0; e < kVec; ++e) result.x[e] = widen(loaded.x[e]);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kVec; ++e)
        if (e < left) result.x[e] = widen(at[e]);
    }
    return result;
  }
  /// f(std::bool_constant<aligned>): one branch for all loads of a chunk.
  template <class F>
  FLASH_DEVICE void with_alignment(F f) const {
    if (aligned)
      f(std::true_type());
    else
      f(std::false_type());
  }
};

/// Two stages of chunks of one operand. One object serves all products of a kernel, one after
/// another: a product starts in the stage that its predecessor did not read last.
template <class Tile, int kWidth>
struct FmaRing {
  FmaOperand<SpreadLayout<Tile, kWidth>, typename Tile::Real, Tile::kDepth> stages[2];
};

/// For kernels that stream both operands.
template <class Tile, int kMaxCols>
struct FmaStages {
  FmaRing<Tile, Tile::kRows> a;
  FmaRing<Tile, kMaxCols> b;
};

struct Unchanged {
  template <class Real>
  FLASH_DEVICE Real operator()(Real x) const {
    return x;
  }
};

/// acc += sum over kk < kDepth of of_a(a[kk][row]) b[kk][col]; a and b point at the thread's first
/// row and column.
template <class Tile, class LayoutA, class LayoutB, int kColCount, class OfA = Unchanged>
FLASH_DEVICE void fma_chunk(typename Tile::Real (&acc)[Tile::kThreadRows][kColCount],
                            const typename Tile::Real* a, const typename Tile::Real* b,
                            OfA of_a = {}) {
  using Vector = typename Tile::Vector;
  constexpr int kVec = Tile::kVec, kRowVectors = Tile::kThreadRows / kVec;
  constexpr int kColVectors = kColCount / kVec;
  Vector rows[2][kRowVectors], cols[2][kColVectors];
  const auto load = [&](int kk) {
#pragma unroll
    for (int i = 0; i < kRowVectors; ++i)
      rows[kk % 2][i] =
          *reinterpret_cast<const Vector*>(a + LayoutA::offset(kk) + i * Tile::kRowLanes * kVec);
#pragma unroll
    for (int j = 0; j < kColVectors; ++j)
      cols[kk % 2][j] =
          *reinterpret_cast<const Vector*>(b + LayoutB::offset(kk) + j * Tile::kColLanes * kVec);
  };
  load(0);
#pragma unroll
  for (int kk = 0; kk < Tile::kDepth; ++kk) {
    if (kk + 1 < Tile::kDepth) load(kk + 1);  // ahead of its use by one step
#pragma unroll
    for (int j = 0; j < kColCount; ++j)
#pragma unroll
      for (int i = 0; i < Tile::kThreadRows; ++i)
        acc[i][j] += of_a(rows[kk % 2][i / kVec].x[i % kVec]) * cols[kk % 2][j / kVec].x[j % kVec];
  }
}

/// A chunk of kRowCount rows x kDepth columns on its way from global memory into a stage, where it
/// lies transposed. Rows and the vectors of a row are neighbours in a warp: whole sectors are read,
/// and SpreadLayout keeps the stores apart.
///
/// begin() starts the way and finish() ends it, for what this thread moves; a barrier then shows
/// the chunk to the others. kAsync: past the registers, for elements that need no conversion.
template <class Tile, class Source, int kRowCount, bool kAsync>
struct TransposedChunk {
  using Real = typename Tile::Real;
  static constexpr int kVec = Tile::kVec, kVectorsPerRow = Tile::kDepth / kVec;
  static constexpr int kRowsPerPass = Tile::kThreads / kVectorsPerRow;
  static constexpr int kPerThread = kRowCount / kRowsPerPass;
  static_assert(kPerThread * kRowsPerPass == kRowCount, "every thread moves as much");

  const Source& source;
  const typename Source::Element* start;
  bool reads[kPerThread];
  typename Tile::Vector vectors[kAsync ? 1 : kPerThread];

  FLASH_DEVICE TransposedChunk(const Source& source, int first_row) : source(source) {
    seek(first_row);
  }
  FLASH_DEVICE void seek(int first_row) {
    start = source.data + (first_row + row()) * source.row_stride + col();
#pragma unroll
    for (int n = 0; n < kPerThread; ++n)
      reads[n] = source.has_row(first_row + row() + n * kRowsPerPass);
  }
  static FLASH_DEVICE int row() { return threadIdx.x / kVectorsPerRow; }
  static FLASH_DEVICE int col() { return threadIdx.x % kVectorsPerRow * kVec; }
  /// The place of element e of the thread's vector n.
  template <class Stage>
  static FLASH_DEVICE Real* place(Stage& stage, int first_k, int n, int e) {
    return stage.at(first_k + col(), row()) + e * Stage::Layout::kWidth + n * kRowsPerPass;
  }

  /// Columns from first_col on, to rows first_k and following of the stage.
  template <class Stage>
  FLASH_DEVICE void begin(Stage& stage, int first_col, int first_k = 0) {
    const int left = source.width - first_col - col();
    if constexpr (kAsync) {
#pragma unroll
      for (int n = 0; n < kPerThread; ++n)
#pragma unroll
        for (int e = 0; e < kVec; ++e)
          cp_async<sizeof(Real)>(shared_address(place(stage, first_k, n, e)),
                                 start + n * kRowsPerPass * source.row_stride + first_col + e,
                                 reads[n] && e < left);
    } else {
      source.with_alignment([&](auto aligned) {
#pragma unroll
        for (int n = 0; n < kPerThread; ++n) {
          vectors[n] = {};
          if (reads[n])
            vectors[n] = source.template load<aligned.value>(
                start + n * kRowsPerPass * source.row_stride + first_col, left);
        }
      });
    }
  }
  template <class Stage>
  FLASH_DEVICE void finish(Stage& stage, int first_k = 0) const {
    if constexpr (kAsync) {
      cp_async_wait_all();
    } else {
#pragma unroll
      for (int n = 0; n < kPerThread; ++n)
#pragma unroll
        for (int e = 0; e < kVec; ++e) *place(stage, first_k, n, e) = vectors[n].x[e];
    }
  }
};

/// A chunk of kDepth rows x kColCount columns, stored as it is read. Each begin() takes the rows
/// that follow those of the one before.
template <class Tile, class Source, int kColCount, bool kAsync>
struct StraightChunk {
  using Real = typename Tile::Real;
  using Vector = typename Tile::Vector;
  static constexpr int kVec = Tile::kVec, kVectorsPerRow = kColCount / kVec;
  static constexpr int kRowsPerPass = Tile::kThreads / kVectorsPerRow;
  static constexpr int kPerThread = Tile::kDepth / kRowsPerPass;
  static_assert(kPerThread * kRowsPerPass == Tile::kDepth, "every thread moves as much");

  const Source& source;
  int row, left;  // columns that the source has from the thread's first one on
  const typename Source::Element* start;
  Vector vectors[kAsync ? 1 : kPerThread];

  FLASH_DEVICE StraightChunk(const Source& source, int first_row, int first_col)
      : source(source),
        row(first_row + threadIdx.x / kVectorsPerRow),
        left(source.width - first_col - col()),
        start(source.data + row * source.row_stride + first_col + col()) {}
  static FLASH_DEVICE int col() { return threadIdx.x % kVectorsPerRow * kVec; }
  template <class Stage>
  static FLASH_DEVICE Real* place(Stage& stage, int n) {
    return stage.at(n * kRowsPerPass + threadIdx.x / kVectorsPerRow, col());
  }

  template <class Stage>
  FLASH_DEVICE void begin(Stage& stage) {
    source.with_alignment([&](auto aligned) {
#pragma unroll
      for (int n = 0; n < kPerThread; ++n) {
        const auto* const from = start + n * kRowsPerPass * source.row_stride;
        const bool reads = source.has_row(row + n * kRowsPerPass);
        if constexpr (kAsync) {
          constexpr int kCount = aligned.value ? kVec : 1;
#pragma unroll
          for (int e = 0; e < kVec; e += kCount)
            cp_async<sizeof(Real) * kCount>(shared_address(place(stage, n) + e), from + e,
                                            reads && e < left);
        } else {
          vectors[n] = {};
          if (reads) vectors[n] = source.template load<aligned.value>(from, left);
        }
      }
    });
    row += Tile::kDepth;
    start += Tile::kDepth * source.row_stride;
  }
  template <class Stage>
  FLASH_DEVICE void finish(Stage& stage) const {
    if constexpr (kAsync) {
      cp_async_wait_all();
    } else {
#pragma unroll
      for (int n = 0; n < kPerThread; ++n) *reinterpret_cast<Vector*>(place(stage, n)) = vectors[n];
    }
  }
};

/// Rows [first_row, first_row + kRows) and `depth` columns of `source`, transposed, as the operand
/// A of products. The product that follows waits for it; the barrier before is the caller's.
template <class Tile, class Operand, class Source>
FLASH_DEVICE void load_transposed(Operand& a, const Source& source, int first_row, int first_col,
                                  int depth) {
  TransposedChunk<Tile, Source, Tile::kRows, Source::kUnconverted> chunk(source, first_row);
#pragma unroll(Source::kUnconverted ? 1 : 4)  // loads in flight
  for (int k = 0; k < depth; k += Tile::kDepth) {
    chunk.begin(a, first_col + k, k);
    if constexpr (!Source::kUnconverted) chunk.finish(a, k);
  }
}

/// acc (kRows x kCols) += A B^T over `depth` columns of B from b_col on; A^T in shared memory. The
/// first chunk of B has begun.
template <class Tile, class Operand, int kWidth, class Chunk, int kColCount>
FLASH_DEVICE void product_abt(typename Tile::Real (&acc)[Tile::kThreadRows][kColCount],
                              const Operand& a, FmaRing<Tile, kWidth>& ring, int& stage, Chunk& b,
                              int b_col, int depth) {
#pragma unroll 1
  for (int k = 0; k < depth; k += Tile::kDepth) {
    auto& chunk = ring.stages[stage];
    b.finish(chunk);
    __syncthreads();  // the chunk is there, and the other stage has been read
    stage ^= 1;
    if (k + Tile::kDepth < depth) b.begin(ring.stages[stage], b_col + k + Tile::kDepth);
    fma_chunk<Tile, typename Operand::Layout, SpreadLayout<Tile, kWidth>>(
        acc, a.at(k, Tile::first_row()), chunk.at(0, Tile::first_col()));
  }
}

/// acc (kRows x kCols) += A B^T over `depth` columns, A = rows of `a` from a_row on, B = rows of
/// `b` from b_row on.
template <class Tile, int kCols, int kWidth, class SourceA, class SourceB>
FLASH_DEVICE void product_abt(typename Tile::Real (&acc)[Tile::kThreadRows][kCols / 8],
                              FmaStages<Tile, kWidth>& rings, int& stage, const SourceA& a,
                              int a_row, const SourceB& b, int b_row, int depth) {
  if (depth <= 0) return;
  TransposedChunk<Tile, SourceA, Tile::kRows, false> next_a(a, a_row);
  TransposedChunk<Tile, SourceB, kCols, false> next_b(b, b_row);
  next_a.begin(rings.a.stages[stage], 0);
  next_b.begin(rings.b.stages[stage], 0);
#pragma unroll 1
  for (int k = 0; k < depth; k += Tile::kDepth) {
    next_a.finish(rings.a.stages[stage]);
    next_b.finish(rings.b.stages[stage]);
    __syncthreads();
    if (k + Tile::kDepth < depth) {
      next_a.begin(rings.a.stages[stage ^ 1], k + Tile::kDepth);
      next_b.begin(rings.b.stages[stage ^ 1], k + Tile::kDepth);
    }
    fma_chunk<Tile, SpreadLayout<Tile, Tile::kRows>, SpreadLayout<Tile, kWidth>>(
        acc, rings.a.stages[stage].at(0, Tile::first_row()),
        rings.b.stages[stage].at(0, Tile::first_col()));
    stage ^= 1;
  }
}

/// acc (kRows x kPanel) += of_a(A) B, A[k][row] in shared memory, B = as many rows of `b`. The
/// first chunk of B has begun; while the last one is multiplied, follow(stage) may begin the next
/// product's first.
template <class Tile, class Operand, int kWidth, class Chunk, int kColCount, class Follow,
          class OfA>
FLASH_DEVICE void product_ab(typename Tile::Real (&acc)[Tile::kThreadRows][kColCount],
                             const Operand& a, FmaRing<Tile, kWidth>& ring, int& stage, Chunk& b,
                             int depth, Follow follow, OfA of_a) {
#pragma unroll 1
  for (int k = 0; k < depth; k += Tile::kDepth) {
    auto& chunk = ring.stages[stage];
    b.finish(chunk);
    __syncthreads();
    stage ^= 1;
    if (k + Tile::kDepth < depth)
      b.begin(ring.stages[stage]);
    else
      follow(ring.stages[stage]);
    fma_chunk<Tile, typename Operand::Layout, SpreadLayout<Tile, kWidth>>(
        acc, a.at(k, Tile::first_row()), chunk.at(0, Tile::first_col()), of_a);
  }
}
/// The same for one product alone, B = rows of `b` from b_row on, columns from b_col on.
template <class Tile, int kPanel, class Operand, int kWidth, class Source, class OfA = Unchanged>
FLASH_DEVICE void product_ab(typename Tile::Real (&acc)[Tile::kThreadRows][kPanel / 8],
                             const Operand& a, FmaRing<Tile, kWidth>& ring, int& stage,
                             const Source& b, int b_row, int b_col, OfA of_a = {}) {
  StraightChunk<Tile, Source, kPanel, false> next(b, b_row, b_col);
  next.begin(ring.stages[stage]);
  product_ab<Tile>(
      acc, a, ring, stage, next, min(Operand::kDepth, b.rows - b_row), [](auto&) {}, of_a);
}

/// acc (kRows x kCols) += A^T B, B[k][col] in shared memory, A = as many rows of `a` from a_row on,
/// its first kRows columns.
template <class Tile, int kCols, class Operand, int kWidth, class Source>
FLASH_DEVICE void product_atb(typename Tile::Real (&acc)[Tile::kThreadRows][kCols / 8],
                              const Source& a, int a_row, FmaRing<Tile, kWidth>& ring, int& stage,
                              const Operand& b) {
  const int depth = min(Operand::kDepth, a.rows - a_row);
  StraightChunk<Tile, Source, Tile::kRows, false> next(a, a_row, 0);
  next.begin(ring.stages[stage]);
#pragma unroll 1
  for (int k = 0; k < depth; k += Tile::kDepth) {
    auto& chunk = ring.stages[stage];
    next.finish(chunk);
    __syncthreads();
    if (k + Tile::kDepth < depth) next.begin(ring.stages[stage ^ 1]);
    fma_chunk<Tile, SpreadLayout<Tile, kWidth>, typename Operand::Layout>(
        acc, chunk.at(0, Tile::first_row()), b.at(k, Tile::first_col()));
    stage ^= 1;
  }
}

}  // namespace flash
