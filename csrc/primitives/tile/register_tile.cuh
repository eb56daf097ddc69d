// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "primitives/device.cuh"
#include "primitives/numeric.cuh"

namespace flash {

/// A warp's fp32 accumulators (kRows x kCols), as m16n8 tiles. This file alone knows that lane l
/// holds the rows l / 4 and l / 4 + 8 of a tile and its columns 2 (l % 4) and 2 (l % 4) + 1.
template <int kRows_, int kCols_>
struct RegisterTile {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kTilesM = kRows / 16, kTilesN = kCols / 8;
  static_assert(kRows % 16 == 0 && kCols % 16 == 0, "made of pairs of m16n8 tiles");

  float at[kTilesM][kTilesN][4];

  FLASH_DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int n = 0; n < kTilesN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) at[m][n][e] = 0.f;
  }
  FLASH_DEVICE void multiply(float factor) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int n = 0; n < kTilesN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) at[m][n][e] *= factor;
  }
};

/// Row and column of element 0 of a lane in an m16n8 tile.
FLASH_DEVICE int lane_row() { return threadIdx.x % 32 / 4; }
FLASH_DEVICE int lane_col() { return threadIdx.x % 4 * 2; }

/// f(float& x, int row, int col) for every element of this lane.
template <int kRows, int kCols, class F>
FLASH_DEVICE void for_each(RegisterTile<kRows, kCols>& tile, int first_row, int first_col, F&& f) {
  first_row += lane_row();
  first_col += lane_col();
#pragma unroll
  for (int m = 0; m < tile.kTilesM; ++m)
#pragma unroll
    for (int n = 0; n < tile.kTilesN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        f(tile.at[m][n][e], first_row + 16 * m + 8 * (e / 2), first_col + 8 * n + e % 2);
}

/// Writes `value` where the column is outside of the row's interval: interval(row) -> {begin, end}.
/// The bounds move by the lane's place, so an element compares them with a constant.
template <int kRows, int kCols, class F>
FLASH_DEVICE void fill_outside(RegisterTile<kRows, kCols>& tile, int first_row, int first_col,
                               float value, F&& interval) {
  first_row += lane_row();
  first_col += lane_col();
#pragma unroll
  for (int m = 0; m < tile.kTilesM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto columns = interval(first_row + 16 * m + 8 * half);
      const int begin = columns.begin - first_col, end = columns.end - first_col;
#pragma unroll
      for (int n = 0; n < tile.kTilesN; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (8 * n + e < begin || 8 * n + e >= end) tile.at[m][n][2 * half + e] = value;
    }
}

/// The four lanes of a row.
FLASH_DEVICE float row_lanes_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
FLASH_DEVICE float row_lanes_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

template <int kRows, int kCols>
FLASH_DEVICE float row_max(const RegisterTile<kRows, kCols>& tile, int m, int half) {
  float most = tile.at[m][0][2 * half];
#pragma unroll
  for (int n = 0; n < tile.kTilesN; ++n)
    most = fmaxf(most, fmaxf(tile.at[m][n][2 * half], tile.at[m][n][2 * half + 1]));
  return row_lanes_max(most);
}

template <int kRows, int kCols>
FLASH_DEVICE void multiply_row(RegisterTile<kRows, kCols>& tile, int m, int half, float factor) {
#pragma unroll
  for (int n = 0; n < tile.kTilesN; ++n) {
    tile.at[m][n][2 * half] *= factor;
    tile.at[m][n][2 * half + 1] *= factor;
  }
}

/// The same, but 0 times a NaN is 0.
template <int kRows, int kCols>
FLASH_DEVICE void multiply_or_clear_row(RegisterTile<kRows, kCols>& tile, int m, int half,
                                        float factor) {
#pragma unroll
  for (int n = 0; n < tile.kTilesN; ++n)
#pragma unroll
    for (int e = 2 * half; e < 2 * half + 2; ++e)
      tile.at[m][n][e] = factor == 0.f ? 0.f : tile.at[m][n][e] * factor;
}

/// A tile rounded to 16 bits, as the left operand of a product: two neighbouring accumulator tiles
/// hold what one A fragment wants, lane by lane.
template <class Element_, int kRows_, int kCols_>
struct RegisterOperand {
  using Element = Element_;
  static constexpr int kTilesM = kRows_ / 16, kStepsK = kCols_ / 16;

  uint32_t at[kTilesM][kStepsK][4];

  FLASH_DEVICE void load(uint32_t (&fragment)[4], int m, int k) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = at[m][k][i];
  }
};

template <class Element, int kRows, int kCols>
FLASH_DEVICE RegisterOperand<Element, kRows, kCols> to_operand(
    const RegisterTile<kRows, kCols>& tile) {
  RegisterOperand<Element, kRows, kCols> operand;
#pragma unroll
  for (int m = 0; m < tile.kTilesM; ++m)
#pragma unroll
    for (int n = 0; n < tile.kTilesN; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        operand.at[m][n / 2][n % 2 * 2 + half] =
            pack<Element>(tile.at[m][n][2 * half], tile.at[m][n][2 * half + 1]);
  return operand;
}

}  // namespace flash
