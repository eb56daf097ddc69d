// SPDX-License-Identifier: BSD-3-Clause
// The hooks of attention/score_mod.h on what a lane holds of a tile of scores: in an m16n8
// accumulator and in one of wgmma, element 2 r + c of tile j is row lane / 4 + 8 r and column
// 8 j + 2 (lane % 4) + c.
#pragma once

#include "attention/params.h"
#include "cuda/common/element.cuh"

namespace flash::cuda {

/// A lane's part of 16 rows x 32 columns; x[4 j + 2 r + c]. A Number of the hooks.
struct ScoreBlock {
  static constexpr int kColumns = 32, kCount = 16;
  float x[kCount];

  /// From the lane's own row and column.
  static FLASH_DEVICE constexpr int row(int i) { return i / 2 % 2 * 8; }
  static FLASH_DEVICE constexpr int column(int i) { return i / 4 * 8 + i % 2; }

  template <class F>
  static FLASH_DEVICE ScoreBlock of(F&& f) {
    ScoreBlock block;
#pragma unroll
    for (int i = 0; i < kCount; ++i) block.x[i] = f(i);
    return block;
  }
};
FLASH_DEVICE ScoreBlock operator+(const ScoreBlock& a, const ScoreBlock& b) {
  return ScoreBlock::of([&](int i) { return a.x[i] + b.x[i]; });
}
FLASH_DEVICE ScoreBlock operator*(const ScoreBlock& a, const ScoreBlock& b) {
  return ScoreBlock::of([&](int i) { return a.x[i] * b.x[i]; });
}
FLASH_DEVICE ScoreBlock operator+(const ScoreBlock& a, float b) {
  return ScoreBlock::of([&](int i) { return a.x[i] + b; });
}
FLASH_DEVICE ScoreBlock operator*(const ScoreBlock& a, float b) {
  return ScoreBlock::of([&](int i) { return a.x[i] * b; });
}
FLASH_DEVICE ScoreBlock operator-(float a, const ScoreBlock& b) {
  return ScoreBlock::of([&](int i) { return a - b.x[i]; });
}
FLASH_DEVICE ScoreBlock tanh_of(const ScoreBlock& a) {
  return ScoreBlock::of([&](int i) { return tanhf(a.x[i]); });
}

/// Elements of a tensor over pairs for one ScoreBlock, by x[i / 2][i % 2].
template <class T>
using BlockValues = AlignedArray<T, 2>[ScoreBlock::kCount / 2];

enum class BlockRows { kQueries, kKeys };  ///< what the rows of a tile are; columns: the other

/// No tensor over pairs lies in shared memory; see BlockPlace.
struct NothingStaged {
  FLASH_DEVICE bool has_bias() const { return false; }
  FLASH_DEVICE bool has_mask() const { return false; }
  template <class Element>
  FLASH_DEVICE ScoreBlock bias() const {
    return {};
  }
  FLASH_DEVICE uint32_t kept() const { return 0; }  ///< the pair i by bit kept_bit(i)
};
/// What four bytes of a mask collect: element 2 r + c of tile j.
FLASH_DEVICE constexpr int kept_bit(int i) { return 16 * (i % 2) + 8 * (i / 2 % 2) + 7 - i / 4; }

/// A ScoreBlock as a Place of ScoreMod::forward. The lane's own element is (row, column) of the
/// sequence. `Staged` brings the bias or the mask from elsewhere, if it has it.
template <class Element, BlockRows kRows, class Staged = NothingStaged>
struct BlockPlace {
  const ForwardParams& p;
  int batch, head, seqlen_q, seqlen_k;
  int row, column;
  Staged staged{};

  FLASH_DEVICE const ScoreMod& mod() const { return p.features.score_mod; }
  FLASH_DEVICE int q(int i) const {
    return kRows == BlockRows::kQueries ? row + ScoreBlock::row(i) : column + ScoreBlock::column(i);
  }
  FLASH_DEVICE int k(int i) const {
    return kRows == BlockRows::kQueries ? column + ScoreBlock::column(i) : row + ScoreBlock::row(i);
  }

  FLASH_DEVICE ScoreBlock bias() const {
    const auto value = [](auto b, int) { return widen(b); };
    if (staged.has_bias()) return staged.template bias<Element>();
    if (mod().bias_is_float32) return map<float>(mod().bias, value);
    return map<Element>(mod().bias, value);
  }
  FLASH_DEVICE ScoreBlock dropped(const ScoreBlock& scores) const {
    if (staged.has_mask()) {
      const uint32_t kept = staged.kept();
      return ScoreBlock::of(
          [&](int i) { return kept >> kept_bit(i) & 1 ? scores.x[i] : -INFINITY; });
    }
    return map<uint8_t>(mod().mask,
                        [&](uint8_t keep, int i) { return keep ? scores.x[i] : -INFINITY; });
  }
  FLASH_DEVICE ScoreBlock distance() const {
    const int diagonal = p.mask.diagonal_offset(seqlen_q, seqlen_k);
    return ScoreBlock::of([&](int i) { return fabsf(static_cast<float>(q(i) + diagonal - k(i))); });
  }
  FLASH_DEVICE float slope() const { return mod().template slope_of<float>(batch, head); }

 private:
  /// f(value, i) for the elements of a tensor over pairs.
  template <class T, class F>
  FLASH_DEVICE ScoreBlock map(const PairView& view, F&& f) const {
    BlockValues<T> values;
    load_global<T>(values, view);
    return ScoreBlock::of([&](int i) { return f(values[i / 2].x[i % 2], i); });
  }

  /// Pairs outside of the sequences, whose scores are masked or not used, read what the last pair
  /// inside reads.
  template <class T>
  FLASH_DEVICE void load_global(BlockValues<T>& values, const PairView& view) const {
    constexpr bool kIsTransposed = kRows == BlockRows::kKeys;
    const int last_row = max((kIsTransposed ? seqlen_k : seqlen_q) - 1, 0);
    const int last_column = max((kIsTransposed ? seqlen_q : seqlen_k) - 1, 0);
    const int64_t row_stride = kIsTransposed ? view.k_stride : view.q_stride;
    const int64_t column_stride = kIsTransposed ? view.q_stride : view.k_stride;
    const T* data[2];
#pragma unroll
    for (int r = 0; r < 2; ++r)
      data[r] = static_cast<const T*>(view.data) + view.offset({batch, head, 0, 0}) +
                min(row + 8 * r, last_row) * row_stride;
    const bool is_inside = column + ScoreBlock::kColumns <= last_column;
    if (is_inside && column_stride == 1 && is_paired<T>(view)) {
#pragma unroll
      for (int i = 0; i < ScoreBlock::kCount / 2; ++i)
        values[i] = *reinterpret_cast<const AlignedArray<T, 2>*>(data[i % 2] + column + i / 2 * 8);
    } else if (is_inside) {
      data[0] += column * column_stride, data[1] += column * column_stride;
#pragma unroll
      for (int i = 0; i < ScoreBlock::kCount; ++i)
        values[i / 2].x[i % 2] = data[i / 2 % 2][ScoreBlock::column(i) * column_stride];
    } else {
#pragma unroll
      for (int i = 0; i < ScoreBlock::kCount; ++i)
        values[i / 2].x[i % 2] =
            data[i / 2 % 2][min(column + ScoreBlock::column(i), last_column) * column_stride];
    }
  }
  /// Whether rows begin at even addresses, so that two columns move as one.
  template <class T>
  static FLASH_DEVICE bool is_paired(const PairView& view) {
    const int64_t row_stride = kRows == BlockRows::kKeys ? view.k_stride : view.q_stride;
    return view.head_stride % 2 == 0 && view.batch_stride % 2 == 0 &&
           rows_are_aligned<2>(static_cast<const T*>(view.data), row_stride);
  }
};

}  // namespace flash::cuda
