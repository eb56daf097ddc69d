// SPDX-License-Identifier: BSD-3-Clause
// What the general variant does to the scores and weights of a warpgroup: the hooks of
// attention/features.h on the elements that a thread holds in a wgmma accumulator.
#pragma once

#include "cuda/common/element.cuh"
#include "cuda/sm90/pair_tiles.h"
#include "cuda/sm90/traits.cuh"

namespace flash::cuda::sm90 {

/// A thread's part of 16 rows x 32 columns of scores: rows lane / 4 and + 8, columns 2 (lane % 4),
/// + 1 and the same 8, 16, 24 further; x[4 j + 2 r + c]. A Number of the hooks.
struct ScoreBlock {
  static constexpr int kColumns = 32, kCount = 16;
  float x[kCount];

  static FLASH_DEVICE constexpr int row(int i) { return i / 2 % 2; }
  static FLASH_DEVICE constexpr int column(int i) {
    return i / 4 * 8 + i % 2;
  }  ///< from the lane's

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

/// The features of one tile at the rows `row` and `row` + 8 of this thread. Made where it is used,
/// from what the loop keeps anyway: coordinates of its own would cost registers.
template <class Traits>
struct GeneralScores {
  using Element = typename Traits::Element;

  const ForwardParams& p;
  const TileId& tile;
  int row;
  PairKind staged;       ///< which tensor has a tile in shared memory
  uint32_t staged_tile;  ///< its address

  /// S = q.k becomes the scores that enter the softmax; `column` is that of accS[0].
  template <int kCount>
  FLASH_DEVICE void modify(float (&accS)[kCount], int column) const {
    static_assert(kCount % ScoreBlock::kCount == 0, "a block of scores spans 32 keys");
    const float scale = static_cast<float>(p.softmax_scale);
#pragma unroll
    for (int j = 0; j < kCount; j += ScoreBlock::kCount) {
      const auto products = ScoreBlock::of([&](int i) { return accS[j + i] * scale; });
      const Place place{*this, column, j * 2};
      const ScoreBlock scores =
          p.features.score_mod.template forward<float, ScoreBlock>(products, place).score;
#pragma unroll
      for (int i = 0; i < ScoreBlock::kCount; ++i) accS[j + i] = scores.x[i];
    }
  }
  FLASH_DEVICE bool has_dropout() const { return p.features.dropout.enabled(); }
  FLASH_DEVICE float dropout_scale() const {
    return has_dropout() ? static_cast<float>(p.features.dropout.scale) : 1.f;
  }
  /// Zeroes dropped weights. One Philox call serves the eight elements of a ScoreBlock whose
  /// columns have the same parity.
  template <int kCount>
  FLASH_DEVICE void drop(float (&accP)[kCount], int column) const {
    const auto stream = DropoutStream::of(p.features.dropout, tile.batch, tile.head, p.num_heads);
#pragma unroll
    for (int j = 0; j < kCount; j += ScoreBlock::kCount)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const PhiloxBlock bits = stream.block(row, column + j * 2 + c);
#pragma unroll
        for (int i = c; i < ScoreBlock::kCount; i += 2)
          if (!stream.keeps(bits, ScoreBlock::row(i), i / 4)) accP[j + i] = 0.f;
      }
  }
  FLASH_DEVICE bool has_sink() const { return p.features.sink.enabled(); }
  FLASH_DEVICE float sink() const { return p.features.sink.template of<float>(tile.head); }

 private:
  /// A ScoreBlock `offset` columns into the tile, whose first column is this thread's `column`, as
  /// a Place of ScoreMod::forward.
  struct Place {
    const GeneralScores& at;
    int column, offset;

    template <class T>
    using Pairs = AlignedArray<T, 2>[ScoreBlock::kCount / 2];

    FLASH_DEVICE const ScoreMod& mod() const { return at.p.features.score_mod; }

    /// From the tile in shared memory, in TMA's 128-byte swizzle: 16-byte unit u of line n lies at
    /// place u ^ n % 8. Eight columns further is a constant bit of the address.
    template <class T>
    FLASH_DEVICE void load_staged(Pairs<T>& pairs) const {
      using Layout = PairTileLayout<T, Traits::kBlockM, Traits::kBlockN>;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = at.row + 8 * r - at.tile.m_block * Traits::kBlockM;
        const uint32_t line = Layout::swizzled(row, 2 * (threadIdx.x % 4));
#pragma unroll
        for (int j = 0; j < ScoreBlock::kCount / 4; ++j)
          pairs[2 * j + r] =
              load_shared<AlignedArray<T, 2>>(at.staged_tile + Layout::moved(line, offset + 8 * j));
      }
    }
    /// From global memory. Rows and keys behind the last one, whose scores are masked or not
    /// stored, read what the last one reads.
    template <class T>
    FLASH_DEVICE void load_global(Pairs<T>& pairs, const PairView& view) const {
      const bool is_paired = view.k_stride == 1 && view.head_stride % 2 == 0 &&
                             view.batch_stride % 2 == 0 &&
                             rows_are_aligned<2>(static_cast<const T*>(view.data), view.q_stride);
      const int last_q = max(at.tile.q.length - 1, 0), last_k = at.tile.k.length - 1;
      const int first_k = column + offset;
      const T* data[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const ScoreCoord c{at.tile.batch, at.tile.head, min(at.row + 8 * r, last_q), 0};
        data[r] = static_cast<const T*>(view.data) + view.offset(c);
      }
      if (is_paired && first_k + ScoreBlock::kColumns <= last_k) {
#pragma unroll
        for (int i = 0; i < ScoreBlock::kCount / 2; ++i)
          pairs[i] =
              *reinterpret_cast<const AlignedArray<T, 2>*>(data[i % 2] + first_k + i / 2 * 8);
      } else {
#pragma unroll
        for (int i = 0; i < ScoreBlock::kCount; ++i) {
          const int k = min(first_k + ScoreBlock::column(i), last_k);
          pairs[i / 2].x[i % 2] = data[i / 2 % 2][k * view.k_stride];
        }
      }
    }
    /// f(value, i) for the elements of a tensor over pairs.
    template <class T, class F>
    FLASH_DEVICE ScoreBlock map(const PairView& view, bool is_staged, F&& f) const {
      Pairs<T> pairs;
      if constexpr (sizeof(T) <= 2) {  // wider tiles would not fit
        if (is_staged) load_staged<T>(pairs);
      }
      if (!is_staged) load_global<T>(pairs, view);
      return ScoreBlock::of([&](int i) { return f(pairs[i / 2].x[i % 2], i); });
    }

    FLASH_DEVICE ScoreBlock bias() const {
      const auto value = [](auto b, int) { return widen(b); };
      if (mod().bias_is_float32) return map<float>(mod().bias, false, value);
      return map<Element>(mod().bias, at.staged == PairKind::kBias, value);
    }
    FLASH_DEVICE ScoreBlock dropped(const ScoreBlock& scores) const {
      return map<uint8_t>(mod().mask, at.staged == PairKind::kMask,
                          [&](uint8_t keep, int i) { return keep ? scores.x[i] : -INFINITY; });
    }
    FLASH_DEVICE ScoreBlock distance() const {
      const int diagonal = at.p.mask.diagonal_offset(at.tile.q.length, at.tile.k.length);
      return ScoreBlock::of([&](int i) {
        const int q = at.row + 8 * ScoreBlock::row(i);
        return fabsf(static_cast<float>(q + diagonal - column - offset - ScoreBlock::column(i)));
      });
    }
    FLASH_DEVICE float slope() const {
      return mod().template slope_of<float>(at.tile.batch, at.tile.head);
    }
  };
};

}  // namespace flash::cuda::sm90
