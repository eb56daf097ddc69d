// SPDX-License-Identifier: BSD-3-Clause
//
// From scores to weights with lanes = keys: the hooks of csrc/attention over vectors of keys of one
// query. Used where P = exp(s - lse) is recomputed: the backward and the attention weights.
#pragma once

#include "attention/params.h"
#include "cpu/rows.h"
#include "cpu/tile.h"

namespace flash::cpu {
namespace {

/// A vector as the Number of csrc/attention.
struct Number {
  Vector x;
};
FLASH_INLINE Number operator+(Number a, Number b) { return {a.x + b.x}; }
FLASH_INLINE Number operator+(Number a, Real b) { return {a.x + splat(b)}; }
FLASH_INLINE Number operator-(Real a, Number b) { return {splat(a) - b.x}; }
FLASH_INLINE Number operator*(Number a, Number b) { return {a.x * b.x}; }
FLASH_INLINE Number operator*(Number a, Real b) { return {a.x * splat(b)}; }
FLASH_INLINE Number tanh_of(Number a) { return {tanh_of(a.x)}; }
FLASH_INLINE Number abs_of(Number a) { return {abs_of(a.x)}; }

FLASH_INLINE Vector lane_index() {
  Vector index = splat(0);
  for (int lane = 0; lane < kLanes; ++lane) index[lane] = Real(lane);
  return index;
}

/// min(x, 0); NaN for NaN.
FLASH_INLINE Vector not_above_zero(Vector x) { return select(x > splat(0), splat(0), x); }

/// Rows of queries that one set of dropout decisions covers (dropout.h).
constexpr int kDropoutRows = 16;

/// Scratch: bias, mask and dropout of one query, for dropout of the kDropoutRows around it, with a
/// block of keys.
struct PairRow {
  alignas(64) Real bias[kBlockKeys];
  alignas(64) Int kept[kBlockKeys];                    ///< of the bool mask: -1 or 0
  alignas(64) Real factor[kDropoutRows * kBlockKeys];  ///< 0 or 1 / (1 - p)
};

/// P of some pairs, where they are dropped, and d(score) / d(softmax_scale q.k).
struct WeightVector {
  Vector weight, slope;
  IntVector dropped;
};

/// One query's view of a block of keys; a few numbers, to be kept in registers.
struct KeyRow {
  const Real *bias, *factor;  ///< of PairRow
  const Int* kept;
  Int key_begin,
      key_end;  ///< the interval that the query keeps, counted from the block's first key
  Real offset;  ///< position of the query from the block's first key
  Real alibi_slope;

  /// From softmax_scale q.k of the keys [j, j + kLanes) of the block to exp(score - lse). With the
  /// lse of these very scores that is at most 1, whatever the rounding of huge ones says.
  FLASH_HOST_DEVICE WeightVector weigh(const ScoreMod& mod, int j, Vector s, Real lse,
                                       bool lse_is_theirs) const {
    const ModifiedScore<Number> modified = mod.forward<Real>(Number{s}, Place{*this, j});
    const IntVector index = lane_numbers() + Int(j);
    IntVector dropped = (index < key_begin) | (index >= key_end);
    if (mod.mask.data) dropped |= load(kept + j) == 0;
    // -inf + NaN would not be -inf: a key that its bias drops may hold anything.
    if (mod.bias.data) dropped |= load(bias + j) == splat(-kInfinity);
    const Vector exponent = (modified.score.x - splat(lse)) * splat(kLog2E);
    const Vector weight = exp2_of(lse_is_theirs ? not_above_zero(exponent) : exponent);
    return {select(dropped, splat(0), weight), select(dropped, splat(1), modified.slope.x),
            dropped};
  }
  /// keep / (1 - p) of dropout.
  FLASH_HOST_DEVICE Vector dropout_factor(int j) const { return load(factor + j); }
  /// |q + diagonal_offset - k|
  FLASH_HOST_DEVICE Vector distance(int j) const {
    return abs_of(splat(offset - Real(j)) - lane_index());
  }

  struct Place {
    const KeyRow& row;
    int j;
    FLASH_HOST_DEVICE Number bias() const { return {load(row.bias + j)}; }
    FLASH_HOST_DEVICE Number distance() const { return {row.distance(j)}; }
    FLASH_HOST_DEVICE Real slope() const { return row.alibi_slope; }
    FLASH_HOST_DEVICE Number dropped(Number s) const {
      return {select(load(row.kept + j), s.x, splat(-kInfinity))};
    }
  };
};

/// The pairs of one query head with a block of keys, row by row.
class KeyLanes {
 public:
  /// `keys` of the block from key k_begin on are what will be looked at.
  KeyLanes(const ForwardParams& p, const IntervalMask& mask, int batch, int head, int k_begin,
           Range keys, PairRow& row)
      : p_(p), mask_(mask), batch_(batch), head_(head), k_begin_(k_begin), keys_(keys), row_(row) {
    const ScoreMod& mod = p.features.score_mod;
    num_keys_ = smaller(kBlockKeys, mask.seqlen_k - k_begin);
    diagonal_ = p.mask.diagonal_offset(mask.seqlen_q, mask.seqlen_k);
    if (mod.alibi_slopes) alibi_slope_ = mod.slope_of<Real>(batch, head);
    for (int j = 0; j < kBlockKeys; ++j) {
      row_.bias[j] = 0;
      row_.kept[j] = 0;
    }
  }

  /// Reads what belongs to row q, whose lse is given: a row with an infinite one keeps nothing.
  /// Rows are entered in ascending order, from a multiple of kDropoutRows on if dropout is enabled.
  KeyRow enter_row(int q, Real lse) {
    const Features& features = p_.features;
    const bool is_empty = lse == kInfinity || lse == -kInfinity;
    read_bias(features.score_mod, q);
    read_mask(features.score_mod, q);
    if (features.dropout.enabled() && q % kDropoutRows == 0) read_dropout(features.dropout, q);
    entered_ = true;
    return {.bias = row_.bias,
            .factor = row_.factor + q % kDropoutRows * kBlockKeys,
            .kept = row_.kept,
            .key_begin = Int(larger(mask_.key_begin(q) - k_begin_, 0)),
            .key_end = is_empty ? Int(0) : Int(smaller(mask_.key_end(q) - k_begin_, kBlockKeys)),
            .offset = Real(q + diagonal_ - k_begin_),
            .alibi_slope = alibi_slope_};
  }

 private:
  void read_bias(const ScoreMod& mod, int q) {
    if (!mod.bias.data || (entered_ && mod.bias.q_stride == 0)) return;
    const int64_t at = mod.bias.offset({batch_, head_, q, k_begin_});
    const DType dtype = mod.bias_is_float32 ? DType::kFloat32 : p_.dtype;
    read_row(dtype, mod.bias.data, at, mod.bias.k_stride, num_keys_, row_.bias);
  }
  void read_mask(const ScoreMod& mod, int q) {
    if (!mod.mask.data || (entered_ && mod.mask.q_stride == 0)) return;
    const uint8_t* from =
        static_cast<const uint8_t*>(mod.mask.data) + mod.mask.offset({batch_, head_, q, k_begin_});
    if (mod.mask.k_stride == 1) {
      for (int j = 0; j < num_keys_; ++j) row_.kept[j] = -Int(from[j] != 0);
    } else {
      for (int j = 0; j < num_keys_; ++j) row_.kept[j] = -Int(from[j * mod.mask.k_stride] != 0);
    }
  }
  /// A Philox call serves the rows q, q + 8 of 16 and the keys k, k + 8, k + 16, k + 24 of 32; the
  /// eight calls for neighbouring keys are one loop over lanes.
  void read_dropout(const Dropout& dropout, int q) {
    constexpr int kSpan = 8;
    const DropoutStream stream = DropoutStream::of(dropout, batch_, head_, p_.num_heads);
    const Real scale = Real(dropout.scale);
    for (int k = keys_.begin / (4 * kSpan) * (4 * kSpan); k < keys_.end; k += 4 * kSpan) {
      for (int row = 0; row < kSpan; ++row) {
        uint32_t words[4][kSpan];
        for (int lane = 0; lane < kSpan; ++lane) {
          const PhiloxBlock block = stream.block(q + row, k_begin_ + k + lane);
          for (int w = 0; w < 4; ++w) words[w][lane] = block.x[w];
        }
        for (int half = 0; half < 8; ++half) {
          Real* to = row_.factor + (row + half / 4 * kSpan) * kBlockKeys + k + half % 4 * kSpan;
          for (int lane = 0; lane < kSpan; ++lane) {
            const uint32_t half_word = words[half / 2][lane] >> half % 2 * 16 & 0xffffu;
            to[lane] = half_word < stream.threshold ? scale : Real(0);
          }
        }
      }
    }
  }

  const ForwardParams& p_;
  const IntervalMask& mask_;
  int batch_, head_, k_begin_, num_keys_ = 0, diagonal_ = 0;
  Range keys_;
  PairRow& row_;
  Real alibi_slope_ = 0;
  bool entered_ = false;
};

}  // namespace
}  // namespace flash::cpu
