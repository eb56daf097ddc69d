// SPDX-License-Identifier: BSD-3-Clause
// Products of one warp, C += A B, operands in shared memory or registers. An operand is read in
// blocks of 16 x 16 by load(fragment, mn, k): block mn along its own dimension (m of A, n of B),
// block k along the shared one.
#pragma once

#include "primitives/ptx/ldmatrix.cuh"
#include "primitives/ptx/mma_sync.cuh"
#include "primitives/tile/register_tile.cuh"
#include "primitives/tile/shared_tile.cuh"

namespace flash {

enum class Side { kA, kB };
enum class Order {
  kRowsAreOwn,    ///< A stored (m, k), B stored (n, k)
  kRowsAreShared  ///< A stored (k, m), B stored (k, n): transposed on the way to the registers
};

/// A warp's part of a SharedTile as an operand; it starts at (first_row, first_col) of the tile.
/// Blocks along the own dimension stand kStride blocks apart, so that warps that share the columns
/// can take turns: first_col = 16 warp, kStride = number of warps, a power of two.
template <Side kSide, Order kOrder, int kStride, class Tile>
class SharedOperand {
 public:
  using Element = typename Tile::Element;

  FLASH_DEVICE SharedOperand(Tile tile, int first_row, int first_col) {
    // The four 8x8 matrices of a block, in the order of the fragment's registers: A runs down the
    // stored rows first and B along the stored chunks, and a transposed operand the other way.
    constexpr bool kRowsFirst = (kSide == Side::kA) == (kOrder == Order::kRowsAreOwn);
    const int lane = threadIdx.x % 32;
    const int row = kRowsFirst ? lane % 16 : lane / 16 * 8 + lane % 8;
    const int chunk = kRowsFirst ? lane / 16 : lane / 8 % 2;
    place_ = Tile::moved(tile.address(first_row + row, chunk), 0, first_col / Tile::kChunkElements);
  }

  FLASH_DEVICE void load(uint32_t (&fragment)[4], int mn, int k) const {
    if constexpr (kOrder == Order::kRowsAreOwn)
      ldmatrix_x4(fragment, Tile::moved(place_, 16 * kStride * mn, 2 * k));
    else
      ldmatrix_x4_trans(fragment, Tile::moved(place_, 16 * k, 2 * kStride * mn));
  }

 private:
  uint32_t place_;
};

/// By what is stored: A (m, k), B (n, k), A (k, m), B (k, n).
template <class Tile>
FLASH_DEVICE auto a_of(Tile tile, int first_row = 0, int first_col = 0) {
  return SharedOperand<Side::kA, Order::kRowsAreOwn, 1, Tile>(tile, first_row, first_col);
}
template <class Tile>
FLASH_DEVICE auto b_transposed_of(Tile tile, int first_row = 0, int first_col = 0) {
  return SharedOperand<Side::kB, Order::kRowsAreOwn, 1, Tile>(tile, first_row, first_col);
}
template <class Tile>
FLASH_DEVICE auto a_transposed_of(Tile tile, int first_row = 0, int first_col = 0) {
  return SharedOperand<Side::kA, Order::kRowsAreShared, 1, Tile>(tile, first_row, first_col);
}
template <int kStride = 1, class Tile>
FLASH_DEVICE auto b_of(Tile tile, int first_row = 0, int first_col = 0) {
  return SharedOperand<Side::kB, Order::kRowsAreShared, kStride, Tile>(tile, first_row, first_col);
}

/// C (kRows x kCols) += A (kRows x kDepth) B (kDepth x kCols). The next B fragment is loaded
/// before the products with this one.
template <int kDepth, int kRows, int kCols, class A, class B>
FLASH_DEVICE void gemm(RegisterTile<kRows, kCols>& c, const A& a, const B& b) {
  using Element = typename B::Element;
  constexpr int kTilesM = kRows / 16, kPairsN = kCols / 16, kStepsK = kDepth / 16;
  static_assert(kDepth % 16 == 0, "m16n8k16 takes 16 of the shared dimension at a time");
  uint32_t a_fragment[kTilesM][4], b_fragment[2][4];
  b.load(b_fragment[0], 0, 0);
#pragma unroll
  for (int k = 0; k < kStepsK; ++k) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) a.load(a_fragment[m], m, k);
#pragma unroll
    for (int n = 0; n < kPairsN; ++n) {
      const int now = (k * kPairsN + n) % 2;
      if (n + 1 < kPairsN) {
        b.load(b_fragment[1 - now], n + 1, k);
      } else if (k + 1 < kStepsK) {
        b.load(b_fragment[1 - now], 0, k + 1);
      }
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        mma_m16n8k16<Element>(c.at[m][2 * n], a_fragment[m], b_fragment[now][0],
                              b_fragment[now][1]);
        mma_m16n8k16<Element>(c.at[m][2 * n + 1], a_fragment[m], b_fragment[now][2],
                              b_fragment[now][3]);
      }
    }
  }
}

}  // namespace flash
