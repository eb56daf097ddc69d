// SPDX-License-Identifier: BSD-3-Clause
// What the kernels of this folder do to scores and weights besides the interval mask: nothing
// (Variant::kPlain), or the hooks of attention/features.h (Variant::kGeneral).
#pragma once

#include "cuda/common/pair_score.cuh"
#include "cuda/common/score_block.cuh"
#include "primitives/tile/register_tile.cuh"

namespace flash::cuda::sm80 {

/// Of one (sequence, query head).
template <class Element, Variant kVariant>
class Scores;

/// The product q.k itself, in units of softmax_scale > 0: products are ordered as scores are.
template <class Element>
class Scores<Element, Variant::kPlain> {
 public:
  FLASH_DEVICE Scores(const ForwardParams& p, int, int, const IntervalMask&)
      : unit(float(p.softmax_scale)) {}

  float unit;
};

/// softmax_scale q.k after the score modifications, in units of 1.
template <class Element>
class Scores<Element, Variant::kGeneral> {
 public:
  FLASH_DEVICE Scores(const ForwardParams& p, int batch, int head, const IntervalMask& mask)
      : p_(p),
        scale_(float(p.softmax_scale)),
        batch_(batch),
        head_(head),
        seqlen_q_(mask.seqlen_q),
        seqlen_k_(mask.seqlen_k) {
    if (has_dropout()) stream_ = DropoutStream::of(p.features.dropout, batch, head, p.num_heads);
  }

  static constexpr float unit = 1.f;

  /// Products become scores. `rows` says what the rows of the tile are, which begins at
  /// (first_row, first_col); f(m, n, slope) gets d(score) / d(scale q.k) of the blocks from tile
  /// (m, n) on.
  template <BlockRows kBlockRows, int kRows, int kCols, class F>
  FLASH_DEVICE void modify(RegisterTile<kRows, kCols>& scores, int first_row, int first_col,
                           F&& f) const {
    static_assert(kCols % ScoreBlock::kColumns == 0, "tiles are made of blocks");
#pragma unroll
    for (int m = 0; m < scores.kTilesM; ++m)
#pragma unroll
      for (int n = 0; n < scores.kTilesN; n += ScoreBlock::kColumns / 8) {
        const auto products =
            ScoreBlock::of([&](int i) { return scores.at[m][n + i / 4][i % 4] * scale_; });
        const BlockPlace<Element, kBlockRows> place{p_,
                                                    batch_,
                                                    head_,
                                                    seqlen_q_,
                                                    seqlen_k_,
                                                    first_row + 16 * m + lane_row(),
                                                    first_col + 8 * n + lane_col()};
        const auto modified =
            p_.features.score_mod.template forward<float, ScoreBlock>(products, place);
#pragma unroll
        for (int i = 0; i < ScoreBlock::kCount; ++i)
          scores.at[m][n + i / 4][i % 4] = modified.score.x[i];
        f(m, n, modified.slope);
      }
  }
  FLASH_DEVICE bool has_dropout() const { return p_.features.dropout.enabled(); }
  FLASH_DEVICE float dropout_scale() const {
    return has_dropout() ? float(p_.features.dropout.scale) : 1.f;
  }

  /// Zeroes the dropped weights of a tile (rows q_begin.., a multiple of 16; columns k_begin.., a
  /// multiple of 32). One Philox call serves this lane's elements of two rows and four m16n8 tiles.
  template <int kRows, int kCols>
  FLASH_DEVICE void drop(RegisterTile<kRows, kCols>& weights, int q_begin, int k_begin) const {
    static_assert(kCols % 32 == 0, "a block of dropout bits spans 32 keys");
#pragma unroll
    for (int m = 0; m < weights.kTilesM; ++m)
#pragma unroll
      for (int n = 0; n < weights.kTilesN; n += 4)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const PhiloxBlock bits =
              stream_.block(q_begin + 16 * m + lane_row(), k_begin + 8 * n + lane_col() + e);
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int column = 0; column < 4; ++column)
              if (!stream_.keeps(bits, half, column)) weights.at[m][n + column][2 * half + e] = 0.f;
        }
  }
  /// Marks the dropped weights of a transposed tile (rows k_begin.., columns q_begin.., multiples
  /// of 16) by a minus sign. Half of a Philox call serves two rows and two m16n8 tiles.
  template <int kRows, int kCols>
  FLASH_DEVICE void mark_dropped(RegisterOperand<Element, kRows, kCols>& weights, int k_begin,
                                 int q_begin) const {
#pragma unroll
    for (int m = 0; m < weights.kTilesM; ++m)
#pragma unroll
      for (int n = 0; n < weights.kStepsK; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int k = k_begin + 16 * m + lane_row();
          const PhiloxBlock all = stream_.block(q_begin + 16 * n + lane_col() + e, k);
          const bool upper = k % 32 >= 16;
          const PhiloxBlock bits{{upper ? all.x[1] : all.x[0], 0, upper ? all.x[3] : all.x[2], 0}};
#pragma unroll
          for (int i = 0; i < 4; ++i)  // the query 8 further: i / 2; the key 8 further: i % 2
            if (!stream_.keeps(bits, i / 2, i % 2)) weights.at[m][n][i] |= 0x8000u << 16 * e;
        }
  }
  /// Whether d(score) / d(scale q.k) is not 1.
  FLASH_DEVICE bool has_slopes() const { return p_.features.score_mod.has_softcap(); }
  FLASH_DEVICE float backward(float ds, float slope) const {
    return p_.features.score_mod.backward(ds, slope);
  }
  FLASH_DEVICE bool has_sink() const { return p_.features.sink.enabled(); }
  FLASH_DEVICE float sink() const { return p_.features.sink.template of<float>(head_); }

 private:
  const ForwardParams& p_;
  DropoutStream stream_{};
  float scale_;
  int batch_, head_, seqlen_q_, seqlen_k_;
};

}  // namespace flash::cuda::sm80
