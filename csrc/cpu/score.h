// SPDX-License-Identifier: BSD-3-Clause
//
// What happens to a block of scores between the two products, forward and backward: the hooks of
// csrc/attention over vectors of queries. Arrays over pairs are (keys, group), as S^T.
#pragma once

#include "attention/params.h"
#include "cpu/element.h"
#include "cpu/tile.h"

namespace flash::cpu {
namespace {

/// The queries of a group: rows [q_begin, q_end) of each of num_heads heads, of one sequence and
/// one kv head. Lane i is row q_begin + i % rows() of head head_begin + i / rows().
struct GroupQueries {
  int batch, head_begin, num_heads, q_begin, q_end;

  int rows() const { return q_end - q_begin; }
  int count() const { return num_heads * rows(); }
  int vectors() const { return (count() + kLanes - 1) / kLanes; }
};

/// f(lane, head, q) for every query of a group.
template <class F>
FLASH_INLINE void for_each_query(const GroupQueries& group, F&& f) {
  for (int h = 0, i = 0; h < group.num_heads; ++h) {
    for (int q = group.q_begin; q < group.q_end; ++q, ++i) f(i, group.head_begin + h, q);
  }
}

/// What the lanes of a group know of themselves. Lanes that stand for no query keep no key.
struct Lanes {
  Int key_begin[kGroupQueries], key_end[kGroupQueries];  ///< the interval of IntervalMask
  Real position[kGroupQueries];                          ///< q + diagonal_offset
  Real slope[kGroupQueries];                             ///< of ALiBi; 0 where off
};
inline void fill_lanes(const ForwardParams& p, const IntervalMask& mask, const GroupQueries& group,
                       Lanes& lanes) {
  const ScoreMod& mod = p.features.score_mod;
  const int diagonal = p.mask.diagonal_offset(mask.seqlen_q, mask.seqlen_k);
  for (int i = 0; i < kGroupQueries; ++i) lanes.key_begin[i] = lanes.key_end[i] = 0;
  for (int i = 0; i < kGroupQueries; ++i) lanes.position[i] = lanes.slope[i] = 0;
  for_each_query(group, [&](int i, int head, int q) {
    lanes.key_begin[i] = mask.key_begin(q);
    lanes.key_end[i] = mask.key_end(q);
    lanes.position[i] = Real(q + diagonal);
    if (mod.alibi_slopes) lanes.slope[i] = mod.slope_of<Real>(group.batch, head);
  });
}
/// Whether the queries of vector v keep key k.
FLASH_INLINE IntVector keeps(const Lanes& lanes, int v, int k) {
  return (load(lanes.key_begin + v * kLanes) <= Int(k)) &
         (load(lanes.key_end + v * kLanes) > Int(k));
}

/// Bias and bool mask of a block of keys for a group, transposed; an array is there if its feature
/// is on.
struct PairBlock {
  Real* bias = nullptr;
  Int* kept = nullptr;  ///< -1 or 0
};
/// to[j][i] = read(offset of the pair (lane i, key k_begin + j)). A tensor that is the same for all
/// the lanes is read once per key.
template <class To, class Read>
FLASH_INLINE void transpose_pairs(const PairView& view, const GroupQueries& group, int k_begin,
                                  int num_keys, int pitch, To* to, Read&& read) {
  const bool same_in_all_lanes =
      (view.q_stride == 0 || group.rows() == 1) && (view.head_stride == 0 || group.num_heads == 1);
  if (same_in_all_lanes) {
    const int64_t first = view.offset({group.batch, group.head_begin, group.q_begin, k_begin});
    for (int j = 0; j < num_keys; ++j) {
      const To value = read(first + j * view.k_stride);
      for (int i = 0; i < pitch; ++i) to[j * pitch + i] = value;
    }
    return;
  }
  const auto read_row = [&](int i, int j, int count, int64_t step, To* line) {
    const int64_t first = j * step + view.offset({group.batch, group.head_begin + i / group.rows(),
                                                  group.q_begin + i % group.rows(), k_begin});
    for (int c = 0; c < count; ++c) line[c] = read(first + c * step);
  };
  if (view.k_stride == 1) {
    transpose_rows(group.count(), num_keys, pitch, to,
                   [&](int i, int j, int count, To* line) { read_row(i, j, count, 1, line); });
  } else {
    transpose_rows(group.count(), num_keys, pitch, to, [&](int i, int j, int count, To* line) {
      read_row(i, j, count, view.k_stride, line);
    });
  }
}
template <class Element>
FLASH_NOINLINE void load_pairs(const ScoreMod& mod, const GroupQueries& group, int k_begin,
                               int num_keys, int pitch, const PairBlock& pairs) {
  if (mod.bias.data && mod.bias_is_float32) {
    transpose_pairs(mod.bias, group, k_begin, num_keys, pitch, pairs.bias,
                    [&](int64_t at) { return Real(static_cast<const float*>(mod.bias.data)[at]); });
  } else if (mod.bias.data) {
    transpose_pairs(mod.bias, group, k_begin, num_keys, pitch, pairs.bias, [&](int64_t at) {
      return Real(widen(static_cast<const Element*>(mod.bias.data)[at]));
    });
  }
  if (mod.mask.data) {
    transpose_pairs(mod.mask, group, k_begin, num_keys, pitch, pairs.kept, [&](int64_t at) {
      return static_cast<const uint8_t*>(mod.mask.data)[at] ? Int(-1) : Int(0);
    });
  }
}

/// A vector as a Number of score_mod.h: a class, so that its overloads are found from there.
struct Number {
  Vector x;
};
FLASH_INLINE Number operator+(Number a, Number b) { return {a.x + b.x}; }
FLASH_INLINE Number operator*(Number a, Number b) { return {a.x * b.x}; }
FLASH_INLINE Number operator-(Number a) { return {-a.x}; }
FLASH_INLINE Number operator+(Number a, Real b) { return {a.x + splat(b)}; }
FLASH_INLINE Number operator*(Number a, Real b) { return {a.x * splat(b)}; }
FLASH_INLINE Number operator-(Real a, Number b) { return {splat(a) - b.x}; }
FLASH_INLINE Number tanh_of(Number a) { return {tanh_of(a.x)}; }

/// The pairs of vector v with key k, as a Place of ScoreMod::forward.
struct VectorPlace {
  const Lanes& lanes;
  const PairBlock& pairs;
  int v, k;
  int64_t at;  ///< of the vector in the arrays of `pairs`

  FLASH_HOST_DEVICE Number bias() const { return {load(pairs.bias + at)}; }
  FLASH_HOST_DEVICE Number distance() const {
    return {abs_of(load(lanes.position + v * kLanes) - splat(Real(k)))};
  }
  FLASH_HOST_DEVICE Number slope() const { return {load(lanes.slope + v * kLanes)}; }
  FLASH_HOST_DEVICE Number dropped(Number s) const {
    return {select(load(pairs.kept + at), s.x, splat(-kInfinity))};
  }
};
/// softmax_scale q.k -> the score that enters the softmax and its derivative, for vector v and the
/// key k_begin + j: modifications, then the interval mask. A dropped pair's score is -inf whatever
/// its key holds: a bias of -inf drops too, and -inf + NaN would not be -inf.
template <int kVectors>
FLASH_INLINE ModifiedScore<Vector> modified_score(const ScoreMod& mod, const Lanes& lanes,
                                                  const PairBlock& pairs, int k_begin, int j, int v,
                                                  Vector s) {
  const VectorPlace place{lanes, pairs, v, k_begin + j, (int64_t(j) * kVectors + v) * kLanes};
  const ModifiedScore<Number> modified = mod.forward<Real>(Number{s}, place);
  IntVector kept = keeps(lanes, v, k_begin + j);
  if (mod.bias.data) kept &= place.bias().x != splat(-kInfinity);
  return {select(kept, modified.score.x, splat(-kInfinity)), modified.slope.x};
}

/// factor[j][i] = 1 if dropout keeps the pair (lane i, key k_begin + j), else 0. The group is one
/// head's. A Philox call serves the rows q, q + 8 of 16 and the keys k, k + 8, k + 16, k + 24
/// of 32.
FLASH_NOINLINE void dropout_factors(const DropoutStream& stream, const GroupQueries& group,
                                    int k_begin, int num_keys, int pitch, Real* factor) {
  constexpr int kSpan = 8;
  const int k_end = k_begin + num_keys;
  if (group.rows() < pitch) std::memset(factor, 0, sizeof(Real) * num_keys * pitch);
  for (int q = group.q_begin / 16 * 16; q < group.q_end; q += 16) {
    for (int k = k_begin / 32 * 32; k < k_end; k += 32) {
      for (int residue = 0; residue < kSpan; ++residue) {
        PhiloxBlock blocks[kSpan];
        for (int lane = 0; lane < kSpan; ++lane) blocks[lane] = stream.block(q + lane, k + residue);
        FLASH_UNROLL
        for (int pair = 0; pair < 8; ++pair) {
          const int row = q + pair / 4 * kSpan, key = k + pair % 4 * kSpan + residue;
          if (key < k_begin || key >= k_end) continue;
          Real* to = factor + int64_t(key - k_begin) * pitch + (row - group.q_begin);
          const int begin = larger(0, group.q_begin - row), end = smaller(kSpan, group.q_end - row);
          for (int lane = begin; lane < end; ++lane) {
            to[lane] = stream.keeps(blocks[lane], pair / 4, pair % 4) ? Real(1) : Real(0);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace flash::cpu
