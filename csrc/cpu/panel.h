// SPDX-License-Identifier: BSD-3-Clause
//
// Matrices cut in panels, and the products of the backward on them. Lanes = keys or columns: a
// block of scores is (queries, keys) with keys contiguous, so K and V are transposed once per block
// of keys and nothing of the queries ever is.
//
// A panel is kPanel columns wide, [row][kPanel], contiguous: the right side of a product streams
// through L1 whatever the strides of the tensor were. A matrix of `width` columns is
// panels(width) panels, the last one padded with zeros; it is widened when it is packed.
//     S[i][.]   = sum_d Q[i][d] K^T[d][.]            score_product
//     dQ[i][.] += sum_j dS[i][j] K[j][.]             add_product: rows of dS, steps along them
//     dK[j][.] += sum_i dS[i][j] Q[i][.]             add_product: columns of dS
#pragma once

#include "cpu/rows.h"
#include "cpu/tile.h"

namespace flash::cpu {
namespace {

// Registers: kPanelRows x kPanelVectors accumulators + kPanelVectors operands + 1 broadcast.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPanelVectors = 4;
#else
constexpr int kPanelVectors = 2;
#endif
constexpr int kPanelRows = 6;
constexpr int kPanel = kPanelVectors * kLanes;
static_assert(kBlockKeys % kPanel == 0, "a block of keys is a whole number of panels");

FLASH_INLINE int panels(int width) { return (width + kPanel - 1) / kPanel; }

/// Calls f.operator()<kVectors>() with the number of vectors, 1 to kPanelVectors, that hold
/// `columns` > 0 columns of a panel.
template <class F>
FLASH_INLINE void with_vectors(int columns, F&& f) {
  if constexpr (kPanelVectors == 4) {
    if (columns > 3 * kLanes) return f.template operator()<4>();
    if (columns > 2 * kLanes) return f.template operator()<3>();
  }
  if (columns > kLanes) return f.template operator()<2>();
  f.template operator()<1>();
}

/// Packs one row of `width` numbers: panel c gets its piece at to + c panel_stride, zeros after it.
FLASH_INLINE void pack_row(DType dtype, const void* data, int64_t at, int width, Real* to,
                           int64_t panel_stride) {
  for (int c = 0; c < width; c += kPanel, to += panel_stride) {
    const int count = smaller(kPanel, width - c);
    read_row(dtype, data, at + c, 1, count, to);
    for (int i = count; i < kPanel; ++i) to[i] = 0;
  }
}
FLASH_INLINE void pack_zero_row(int width, Real* to, int64_t panel_stride) {
  for (int c = 0; c < width; c += kPanel, to += panel_stride) {
    for (int i = 0; i < kPanel; ++i) to[i] = 0;
  }
}
FLASH_INLINE void unpack_row(DType dtype, const Real* from, int64_t panel_stride, int width,
                             void* data, int64_t at) {
  for (int c = 0; c < width; c += kPanel, from += panel_stride) {
    write_row(dtype, data, at + c, smaller(kPanel, width - c), from);
  }
}
/// NaN in some lane if any of the `count` numbers, a multiple of kLanes, is not finite; else 0.
FLASH_INLINE Vector poison_of(const Real* from, int64_t count) {
  Vector poison = splat(0);  // x 0 is 0 for every finite x, NaN for the others
  for (int64_t i = 0; i < count; i += kLanes) poison = fma(load(from + i), splat(0), poison);
  return poison;
}
FLASH_INLINE bool is_finite(Vector poison) { return sum_of_lanes(poison) == 0; }

/// to = factor * transpose of a packed block of keys: to is [panel of keys][width][kPanel].
FLASH_NOINLINE void transpose_block(const Real* rows, int width, Real factor, Real* to) {
  for (int p = 0; p < kBlockKeys; p += kPanel) {
    for (int d = 0; d < width; ++d, to += kPanel) {
      const Real* column =
          rows + int64_t(d / kPanel) * kBlockKeys * kPanel + p * kPanel + d % kPanel;
      for (int j = 0; j < kPanel; ++j) to[j] = column[j * kPanel] * factor;
    }
  }
}

/// scores[i][.] = sum_c left[i][c] right[c][.] for a panel of keys. left is packed with panels
/// left_panel apart, `rows` is a multiple of kPanelRows, right is (width, kPanel).
template <int kVectors>
FLASH_NOINLINE void score_product(const Real* left, int64_t left_panel, int rows, int width,
                                  const Real* right, Real* scores) {
  for (int i = 0; i < rows; i += kPanelRows) {
    VectorGroup<kVectors> acc[kPanelRows];
    FLASH_UNROLL
    for (int r = 0; r < kPanelRows; ++r) acc[r] = splat_group<kVectors>(0);
    const Real* left_piece = left + int64_t(i) * kPanel;
    for (int c = 0; c < width; c += kPanel, left_piece += left_panel) {
      multiply_tile(acc, left_piece, kPanel, 1, right + int64_t(c) * kPanel, kPanel,
                    smaller(kPanel, width - c));
    }
    FLASH_UNROLL
    for (int r = 0; r < kPanelRows; ++r) store_group(scores + (i + r) * kScorePitch, acc[r]);
  }
}

template <int kRows, int kVectors>
FLASH_INLINE void add_tile(const Real* left, int64_t left_row, int64_t left_step, const Real* right,
                           int count, Real* sums) {
  VectorGroup<kVectors> acc[kRows];
  FLASH_UNROLL
  for (int r = 0; r < kRows; ++r) acc[r] = load_group<kVectors>(sums + r * kPanel);
  multiply_tile(acc, left, left_row, left_step, right, kPanel, count);
  FLASH_UNROLL
  for (int r = 0; r < kRows; ++r) store_group(sums + r * kPanel, acc[r]);
}
/// sums[r][.] += sum_i left(r, i) right[i][.] for one panel of right and of sums. left(r, i) is at
/// left + r left_row + i left_step. `rows` is even.
template <int kVectors>
FLASH_NOINLINE void add_product(const Real* left, int64_t left_row, int64_t left_step, int rows,
                                const Real* right, int count, Real* sums) {
  int r = 0;
  for (; r + kPanelRows <= rows; r += kPanelRows) {
    add_tile<kPanelRows, kVectors>(left + r * left_row, left_row, left_step, right, count,
                                   sums + r * kPanel);
  }
  for (; r < rows; r += 2) {
    add_tile<2, kVectors>(left + r * left_row, left_row, left_step, right, count,
                          sums + r * kPanel);
  }
}
/// The same pair by pair, without the pairs that both weights give nothing: 0 * NaN is NaN, so a
/// weight of 0 alone does not protect a sum from a row of `right` that it must not see.
FLASH_NOINLINE void add_product_of_kept_pairs(const Real* left, const Real* other, int64_t left_row,
                                              int64_t left_step, int rows, const Real* right,
                                              int count, Real* sums) {
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < count; ++i) {
      const int64_t at = r * left_row + i * left_step;
      if (left[at] == 0 && other[at] == 0) continue;
      for (int c = 0; c < kPanel; ++c) {
        sums[r * kPanel + c] += left[at] * right[int64_t(i) * kPanel + c];
      }
    }
  }
}

}  // namespace
}  // namespace flash::cpu
