// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "primitives/numeric.cuh"
#include "primitives/tile/register_tile.cuh"

namespace flash::cuda::sm80 {

inline constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

/// The running softmax of a warp's rows (FlashAttention-2, Algorithm 1: m and l). Scores come in
/// units of `unit` > 0: weight = exp(unit (s - max)). Every lane adds up its own columns; the four
/// lanes of a row meet in finish().
template <int kRows>
class OnlineSoftmax {
 public:
  FLASH_DEVICE explicit OnlineSoftmax(float unit) : unit_(unit), unit_log2_(unit * kLog2E) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        max_[m][half] = -INFINITY;
        sum_[m][half] = 0.f;
      }
  }

  /// Takes a block of scores and makes them weights of the new maximum:
  ///   m' = max(m, rowmax(S)),  f = exp(m - m'),  P = exp(S - m'),  l = f l + rowsum(P),  O = f O.
  template <int kCols, int kColsO>
  FLASH_DEVICE void update(RegisterTile<kRows, kCols>& scores, RegisterTile<kRows, kColsO>& out) {
    float base[kTilesM]
              [2];  // the maximum; 0 where no score is above -inf, so that -inf - base = -inf
    bool is_small = true;
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float old_max = max_[m][half];
        const float new_max = fmaxf(old_max, row_max(scores, m, half));
        max_[m][half] = new_max;
        base[m][half] = new_max == -INFINITY ? 0.f : new_max;
        is_small = is_small && fabsf(base[m][half] * unit_log2_) < kSmall;
        const float factor = exp2_approx((old_max - base[m][half]) * unit_log2_);
        sum_[m][half] *= factor;
        multiply_row(out, m, half, factor);
      }
    // unit (s - max) in one operation rounds unit max, which is harmless for a small maximum (every
    // weight of the row gets the same factor) and turns finite huge scores into NaN.
    if (__all_sync(0xffffffffu, is_small))
      exponentiate<true>(scores, base);
    else
      exponentiate<false>(scores, base);
  }

  /// A key without a value: it joins the denominator only. O is divided by the sum later, so the
  /// change of maximum goes into O as well.
  template <int kColsO>
  FLASH_DEVICE void add_sink(float sink, RegisterTile<kRows, kColsO>& out) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float new_max = fmaxf(max_[m][half], sink / unit_);
        const float base = new_max == -INFINITY ? 0.f : new_max;
        const float factor = exp2_approx((max_[m][half] - base) * unit_log2_);
        const bool first_lane = threadIdx.x % 4 == 0;
        const float weight = exp2_approx((sink / unit_ - base) * unit_log2_);
        sum_[m][half] = sum_[m][half] * factor + (first_lane ? weight : 0.f);
        max_[m][half] = new_max;
        multiply_or_clear_row(out, m, half, factor);
      }
  }

  /// O = O factor / l; f(lane's row, lse), once per row, where rows count from first_row. A row
  /// without keys has O = 0, lse = -inf.
  template <int kColsO, class F>
  FLASH_DEVICE void finish(RegisterTile<kRows, kColsO>& out, float factor, int first_row, F&& f) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = row_lanes_sum(sum_[m][half]);
        const float base = max_[m][half] == -INFINITY ? 0.f : max_[m][half];
        multiply_or_clear_row(out, m, half, sum == 0.f ? 0.f : factor / sum);
        if (threadIdx.x % 4 == 0)
          f(first_row + 16 * m + 8 * half + lane_row(),
            sum == 0.f ? -INFINITY : base * unit_ + logf(sum));
      }
  }

 private:
  static constexpr int kTilesM = kRows / 16;
  static constexpr float kSmall = 1024.f;

  template <bool kOneOperation, int kCols>
  FLASH_DEVICE void exponentiate(RegisterTile<kRows, kCols>& scores,
                                 const float (&base)[kTilesM][2]) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float shift = -base[m][half] * unit_log2_;
#pragma unroll
        for (int n = 0; n < scores.kTilesN; ++n)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            float& s = scores.at[m][n][e];
            s = exp2_approx(kOneOperation ? fmaf(s, unit_log2_, shift)
                                          : (s - base[m][half]) * unit_log2_);
            sum_[m][half] += s;
          }
      }
  }

  float unit_, unit_log2_;
  float max_[kTilesM][2], sum_[kTilesM][2];
};

}  // namespace flash::cuda::sm80
