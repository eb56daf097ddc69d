// SPDX-License-Identifier: BSD-3-Clause
//
// The operands of the backward for bf16, and its five products, in pairs (pair_product.h). Each has
// A row by row and B in pairs, and vectors of columns:
//     S         = Q K^T         A = Q         B = K in pairs of columns      columns are keys
//     dP        = dO V^T        A = dO        B = V in pairs of columns
//     dV^T     += dO^T P        A = dO^T      B = P in pairs of queries
//     dK^T     += Q^T dS        A = Q^T       B = dS in pairs of queries
//     dQ       += dS K          A = dS        B = K in pairs of keys         columns are head_dim's
// P and dS are rounded to bf16 as operands; all sums are fp32. backward_panels.h has the same names
// for the other types, and for gradients of the weights, which never come here.
#pragma once

#if defined(FLASH_CPU_BF16)

#include "cpu/backward_head.h"
#include "cpu/pair_pack.h"

namespace flash::cpu {
namespace {

using ProductScope = PairScope;
constexpr int kRowStep = kPairDepth, kRowsOfCut = kPairDepth;
static_assert(kChunkQueries % kPairDepth == 0, "a chunk is whole steps of products over queries");

FLASH_INLINE int whole_steps(int width) { return round_up(width, kPairDepth); }
FLASH_INLINE int whole_strips(int width) { return round_up(width, 16); }
/// An odd number of cache lines: rows of pairs start in different sets of the L1 cache.
FLASH_INLINE int pairs_pitch(int width) { return (whole_strips(width) / 16 | 1) * 16; }

/// Q or dO of a chunk: rows (kChunkQueries, whole steps), then columns (whole strips,
/// kChunkQueries).
struct RowOperand {
  BFloat16 *rows, *columns;

  RowOperand(Real* at, int width)
      : rows(reinterpret_cast<BFloat16*>(at)), columns(rows + kChunkQueries * whole_steps(width)) {}
  static int64_t reals(int width) {
    return int64_t(kChunkQueries) * (whole_steps(width) + whole_strips(width)) / 2;
  }
};
ChunkSizes chunk_sizes(const GradientTask& task) {
  const int d = task.p.head_dim;
  return {RowOperand::reals(d), RowOperand::reals(task.p.head_dim_v),
          task.dq.data ? int64_t(kChunkQueries) * whole_strips(d) : 0};
}
void put_row(DType, const void* data, int64_t at, int width, int i, Real* operand) {
  BFloat16* to = RowOperand(operand, width).rows + i * whole_steps(width);
  if (data) {
    copy_rows(static_cast<const BFloat16*>(data) + at, 0, 1, width, to);
  } else {
    std::memset(to, 0, sizeof(BFloat16) * whole_steps(width));
  }
}
bool finish_rows(int rows, int width, Real* operand) {
  const RowOperand chunk(operand, width);
  return transpose_numbers<false>(chunk.rows, whole_steps(width), rows, width, chunk.columns,
                                  kChunkQueries);
}
void take_row(DType dtype, const Real* dq, int i, int width, void* data, int64_t at) {
  write_row(dtype, data, at, width, dq + i * whole_strips(width));
}

/// No NaN, no infinity.
FLASH_NOINLINE bool are_finite(const BFloat16* rows, int64_t stride, int count, int width) {
  uint32_t found = 0;
  for (int j = 0; j < count; ++j) {
    const BFloat16* row = rows + j * stride;
    for (int c = 0; c < width; ++c) found |= (row[c].bits & kExponent) == kExponent;
  }
  return !found;
}

/// Calls f.operator()<kVectors>(first) for the columns [begin, end) in panels of three vectors or
/// two; one alone only where there is no more.
template <class F>
FLASH_INLINE void with_column_panels(int begin, int end, F&& f) {
  for (int left = (end - begin + kLanes - 1) / kLanes; left > 0;) {
    if (left == 3 || left > 4) {
      f.template operator()<3>(begin);
      left -= 3, begin += 3 * kLanes;
    } else if (left > 1) {
      f.template operator()<2>(begin);
      left -= 2, begin += 2 * kLanes;
    } else {
      f.template operator()<1>(begin);
      left = 0;
    }
  }
}
template <bool kAdds>
FLASH_NOINLINE void multiply_columns(const BFloat16* a, int64_t a_stride, int rows, const Int* b,
                                     int64_t pitch, int steps, Real* out, int64_t out_pitch,
                                     Range columns) {
  with_column_panels(columns.begin, columns.end, [&]<int kVectors>(int first) {
    multiply_pairs<kVectors, kAdds>(a, a_stride, rows, b + first, pitch, steps, out + first,
                                    out_pitch);
  });
}

class BlockOperands {
 public:
  Real *p, *ds;  ///< (kChunkQueries, kScorePitch)
  Real scale_of_scores = 1;

  BlockOperands(Arena& arena, const GradientTask& task)
      : head_dim_(task.p.head_dim), head_dim_v_(task.p.head_dim_v) {
    constexpr int64_t kScores = int64_t(kChunkQueries) * kScorePitch;
    p = arena.take<Real>(kScores);
    ds = arena.take<Real>(kScores);
    p_pairs_ = arena.take<Int>(kScores / 2);
    ds_pairs_ = arena.take<Int>(kScores / 2);
    ds_rows_ = arena.take<BFloat16>(int64_t(kChunkQueries) * kRowPitch);
    k_columns_ = arena.take<Int>(whole_steps(head_dim_) / 2 * int64_t(kScorePitch));
    v_columns_ = arena.take<Int>(whole_steps(head_dim_v_) / 2 * int64_t(kScorePitch));
    k_pairs_ = arena.take<Int>(kBlockKeys / 2 * int64_t(pairs_pitch(head_dim_)));
    dk_t_ = arena.take<Real>(whole_strips(head_dim_) * int64_t(kScorePitch));
    dv_t_ = arena.take<Real>(whole_strips(head_dim_v_) * int64_t(kScorePitch));
    result_ = arena.take<Real>(int64_t(kBlockKeys) * whole_strips(larger(head_dim_, head_dim_v_)));
  }

  bool load_block(const KvHead& head, int n) {
    const ForwardParams& params = head.task.p;
    const int keys = keys_of(head, n);
    const BFloat16* k = at<const BFloat16>(head, n, params.k);
    const BFloat16* v = at<const BFloat16>(head, n, params.v);
    const int64_t k_stride = params.k.row_stride, v_stride = params.v.row_stride;
    scale_of_scores = SplitScale::of(head.score_scale()).of_scores;
    pack_scaled_columns(keys, head_dim_, kScorePitch, head.score_scale(), k_columns_,
                        [&](int j) { return k + j * k_stride; });
    pack_columns(keys, head_dim_v_, kScorePitch, v_columns_,
                 [&](int j) { return v + j * v_stride; });
    pack_key_pairs(k, k_stride, keys);
    std::memset(dk_t_, 0, sizeof(Real) * whole_strips(head_dim_) * kScorePitch);
    std::memset(dv_t_, 0, sizeof(Real) * whole_strips(head_dim_v_) * kScorePitch);
    return are_finite(k, k_stride, keys, head_dim_) && are_finite(v, v_stride, keys, head_dim_v_);
  }
  void store_block(const KvHead& head, int n) const {
    store_transposed(head, n, head.task.dk, head_dim_, dk_t_);
    store_transposed(head, n, head.task.dv, head_dim_v_, dv_t_);
  }

  void multiply_scores(const Step& step) const {
    score(step, RowOperand(step.chunk.q, head_dim_), head_dim_, k_columns_, p);
  }
  void multiply_gradients(const Step& step) const {
    score(step, RowOperand(step.chunk.dout, head_dim_v_), head_dim_v_, v_columns_, ds);
  }
  /// P and dS as operands: in pairs of queries, dS also row by row. What whole steps of the
  /// products have beyond the step's rows and keys is 0.
  void round_weights(const Step& step) const {
    const Range keys = whole_vectors_of(step.keys);
    for (int i = step.rows.begin; i < whole_steps(step.rows.end); i += 2) {
      const int64_t row = int64_t(i) * kScorePitch, pair = row / 2;
      const auto read = [&](const Real* from, int r, int j) {
        const bool is_there = i + r < step.rows.end && j >= keys.begin && j < keys.end;
        if (!is_there) return Vector{};
        const Vector x = load(from + row + r * kScorePitch + j);
        const bool is_whole = j + kLanes <= step.keys.end;
        return is_whole ? x : select(lane_numbers() + Int(j) < Int(step.keys.end), x, splat(0));
      };
      for (int j = keys.begin; j < keys.end; j += kLanes) {
        store(p_pairs_ + pair + j, rounded_pairs(read(p, 0, j), read(p, 1, j)));
        store(ds_pairs_ + pair + j, rounded_pairs(read(ds, 0, j), read(ds, 1, j)));
      }
      BFloat16* rows = ds_rows_ + int64_t(i) * kRowPitch;
      for (int j = depth_begin(step); j < depth_end(step); j += kPairDepth) {
        for (int r = 0; r < 2; ++r)
          store_rounded(read(ds, r, j), read(ds, r, j + kLanes), rows + r * kRowPitch + j);
      }
    }
  }
  void add_to_values(const Step& step, bool by_pairs) const {
    const RowOperand dout(step.chunk.dout, head_dim_v_);
    by_pairs ? add_kept_pairs(step, p, ds, dout, head_dim_v_, dv_t_)
             : add_to_columns(step, dout, head_dim_v_, p_pairs_, dv_t_);
  }
  void add_to_keys(const Step& step, bool by_pairs) const {
    const RowOperand q(step.chunk.q, head_dim_);
    by_pairs ? add_kept_pairs(step, ds, p, q, head_dim_, dk_t_)
             : add_to_columns(step, q, head_dim_, ds_pairs_, dk_t_);
  }
  void add_to_queries(const Step& step, bool by_pairs) const {
    const int width = whole_strips(head_dim_), first = depth_begin(step);
    if (by_pairs) return add_kept_pairs_to_queries(step);
    multiply_columns<true>(ds_rows_ + int64_t(step.rows.begin) * kRowPitch + first, kRowPitch,
                           step.rows.end - step.rows.begin,
                           k_pairs_ + first / 2 * int64_t(pairs_pitch(head_dim_)),
                           pairs_pitch(head_dim_), (depth_end(step) - first) / kPairDepth,
                           step.chunk.dq + int64_t(step.rows.begin) * width, width, {0, head_dim_});
  }

 private:
  static constexpr int kRowPitch = kBlockKeys + kPairDepth;

  static int keys_of(const KvHead& head, int n) {
    return smaller(kBlockKeys, head.mask.seqlen_k - n * kBlockKeys);
  }
  /// The first row of block n.
  template <class Element>
  static Element* at(const KvHead& head, int n, const TensorView& view) {
    return static_cast<Element*>(view.data) + view.offset(head.k_rows, head.head_k) +
           int64_t(n) * kBlockKeys * view.row_stride;
  }
  static Range whole_vectors_of(Range keys) {
    return {keys.begin / kLanes * kLanes, round_up(keys.end, kLanes)};
  }
  /// The keys of a step as the depth of a product.
  static int depth_begin(const Step& step) { return step.keys.begin / kPairDepth * kPairDepth; }
  static int depth_end(const Step& step) { return whole_steps(step.keys.end); }

  /// Zeros for keys up to whole steps.
  void pack_key_pairs(const BFloat16* k, int64_t stride, int keys) const {
    const int64_t pitch = pairs_pitch(head_dim_);
    for (int j = 0; j < whole_steps(keys); j += 2) {
      Int* to = k_pairs_ + j / 2 * pitch;
      const BFloat16 *low = k + j * stride, *high = low + stride;
      if (j + 1 < keys) {
        for (int c = 0; c < head_dim_; ++c) to[c] = Int(low[c].bits | uint32_t(high[c].bits) << 16);
      } else {
        for (int c = 0; c < head_dim_; ++c) to[c] = j < keys ? low[c].bits : 0;
      }
    }
  }
  void store_transposed(const KvHead& head, int n, const TensorView& view, int width,
                        const Real* sums) const {
    if (!view.data) return;
    const int keys = keys_of(head, n), pitch = whole_strips(width);
    const auto read = [&](int c, int j, int count, Real* line) {
      std::memcpy(line, sums + int64_t(c) * kScorePitch + j, sizeof(Real) * count);
    };
    transpose_rows(width, keys, pitch, result_, read);
    const int64_t first = at<BFloat16>(head, n, view) - static_cast<BFloat16*>(view.data);
    for (int j = 0; j < keys; ++j) {
      write_row(head.task.p.dtype, view.data, first + j * view.row_stride, width,
                result_ + int64_t(j) * pitch);
    }
  }

  void score(const Step& step, const RowOperand& left, int width, const Int* right,
             Real* scores) const {
    multiply_columns<false>(
        left.rows + step.rows.begin * whole_steps(width), whole_steps(width),
        step.rows.end - step.rows.begin, right, kScorePitch, whole_steps(width) / kPairDepth,
        scores + int64_t(step.rows.begin) * kScorePitch, kScorePitch, whole_vectors_of(step.keys));
  }
  /// sums (width, keys) += left^T weights.
  void add_to_columns(const Step& step, const RowOperand& left, int width, const Int* weights,
                      Real* sums) const {
    const int first = step.rows.begin;
    multiply_columns<true>(left.columns + first, kChunkQueries, width,
                           weights + first / 2 * int64_t(kScorePitch), kScorePitch,
                           (whole_steps(step.rows.end) - first) / kPairDepth, sums, kScorePitch,
                           whole_vectors_of(step.keys));
  }
  /// The same pair by pair, without the pairs that both weights give nothing: 0 * NaN is NaN, so a
  /// weight of 0 alone does not protect a sum from a row that it must not see.
  void add_kept_pairs(const Step& step, const Real* weights, const Real* others,
                      const RowOperand& left, int width, Real* sums) const {
    const Range keys = whole_vectors_of(step.keys);
    for (int i = step.rows.begin; i < step.rows.end; ++i) {
      for (int c = 0; c < width; ++c) {
        const Vector value = splat(widen(left.rows[i * whole_steps(width) + c]));
        for (int j = keys.begin; j < keys.end; j += kLanes) {
          const int64_t pair = int64_t(i) * kScorePitch + j;
          const Vector weight = load(weights + pair);
          const IntVector kept = (weight != splat(0)) | (load(others + pair) != splat(0));
          Real* to = sums + int64_t(c) * kScorePitch + j;
          store(to, select(kept, fma(weight, value, load(to)), load(to)));
        }
      }
    }
  }
  void add_kept_pairs_to_queries(const Step& step) const {
    for (int i = step.rows.begin; i < step.rows.end; ++i) {
      Real* to = step.chunk.dq + int64_t(i) * whole_strips(head_dim_);
      for (int j = step.keys.begin; j < step.keys.end; ++j) {
        const int64_t pair = int64_t(i) * kScorePitch + j;
        if (ds[pair] == 0 && p[pair] == 0) continue;
        const Int* k = k_pairs_ + j / 2 * int64_t(pairs_pitch(head_dim_));
        for (int c = 0; c < head_dim_; ++c)
          to[c] += ds[pair] * float_of(j % 2 ? k[c] & 0xffff0000 : uint32_t(k[c]) << 16);
      }
    }
  }

  int head_dim_, head_dim_v_;
  Int *p_pairs_, *ds_pairs_;      ///< (kChunkQueries / 2, kScorePitch)
  BFloat16* ds_rows_;             ///< (kChunkQueries, kRowPitch)
  Int *k_columns_, *v_columns_;   ///< (head_dim / 2, kScorePitch), K with a part of the scale
  Int* k_pairs_;                  ///< (kBlockKeys / 2, pairs_pitch)
  Real *dk_t_, *dv_t_, *result_;  ///< sums (head_dim, kScorePitch); dK or dV row by row
};

}  // namespace
}  // namespace flash::cpu

#endif
