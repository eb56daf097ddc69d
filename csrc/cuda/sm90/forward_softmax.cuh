// SPDX-License-Identifier: BSD-3-Clause
// The running softmax of the two rows that a thread holds in a wgmma accumulator.
//
//   m' = max(m, rowmax S)    P = 2^(c (S - m'))    l = l 2^(c (m - m')) + rowsum P
//
// with c = scale log2 e.
//
// P need not be at most 1: any m that is near the maximum gives the same result to rounding. So
//   update   keeps a stale m while S outgrew it by less than 2^8, and O is rescaled rarely;
//   keep     (bf16 weights: exponents of fp32) takes m as it is: no maximum, shuffle or rescale.
//
// The exponent is c (S - m), or one multiply-add c S - c m: shorter, but the rounding of c m
// remains as a factor 2^(|c m| 2^-24), and overflow can make it NaN. A row whose |c m| exceeds
// 2^13, or whose l reaches 2^64 under a kept m, is not safe: its tile is done again, this row by
// `update` with the exact exponent, the others just as before, so that no row changes another's
// bits.
#pragma once

#include "cuda/sm90/traits.cuh"
#include "primitives/numeric.cuh"

namespace flash::cuda::sm90 {

enum class Exponent { kMultiplyAdd, kSubtractFirst };

template <class Traits>
struct RowSoftmax {
  static constexpr float kStaleLog2 = 8.f, kSafeLog2 = 8192.f, kSafeSum = 0x1p64f;

  float scale_log2;  ///< c
  float row_max[2], row_sum[2];
  float rescale[2];  ///< of O, after update

  /// S of row r becomes P; returns the sum over this thread's columns.
  template <Exponent kExponent, int kCount>
  FLASH_DEVICE float exponentials(float (&accS)[kCount], int r, float base) const {
    const float offset = __fmul_rn(base, scale_log2);
    float sum[2] = {};
#pragma unroll
    for (int j = 0; j < kCount / 2; ++j) {
      float& s = accS[j / 2 * 4 + r * 2 + j % 2];
      s = exp2_approx(kExponent == Exponent::kMultiplyAdd ? fmaf(s, scale_log2, -offset)
                                                          : (s - base) * scale_log2);
      sum[j % 2] += s;
    }
    return sum[0] + sum[1];
  }
  template <int kCount>
  FLASH_DEVICE static float row_maximum(const float (&accS)[kCount], int r) {
    float even = accS[r * 2], odd = accS[r * 2 + 1];
#pragma unroll
    for (int j = 1; j < kCount / 4; ++j) {
      even = fmaxf(even, accS[j * 4 + r * 2]);
      odd = fmaxf(odd, accS[j * 4 + r * 2 + 1]);
    }
    float maximum = fmaxf(even, odd);  // of this thread; the row lies in four
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
    return fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
  }
  /// A row without a key yet has m = -inf: subtract 0, for -inf - -inf is NaN.
  FLASH_DEVICE static float base_of(float maximum) { return maximum == -INFINITY ? 0.f : maximum; }

  template <Exponent kExponent, int kCount>
  FLASH_DEVICE void first(float (&accS)[kCount]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_max[r] = row_maximum(accS, r);
      row_sum[r] = exponentials<kExponent>(accS, r, base_of(row_max[r]));
    }
  }
  template <Exponent kExponent, int kCount>
  FLASH_DEVICE void update(float (&accS)[kCount]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) update_row<kExponent>(accS, r, row_maximum(accS, r));
  }
  template <int kCount>
  FLASH_DEVICE void keep(float (&accS)[kCount]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) keep_row(accS, r);
  }

  // The second time: rows that were not safe, and the others as they were done the first time.
  template <int kCount>
  FLASH_DEVICE void first_again(float (&accS)[kCount], const UnsafeRows& unsafe) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_max[r] = row_maximum(accS, r);
      const float base = base_of(row_max[r]);
      row_sum[r] = unsafe.has(r) ? exponentials<Exponent::kSubtractFirst>(accS, r, base)
                                 : exponentials<Exponent::kMultiplyAdd>(accS, r, base);
    }
  }
  template <int kCount>
  FLASH_DEVICE void update_again(float (&accS)[kCount], const UnsafeRows& unsafe, bool kept) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float maximum = row_maximum(accS, r);  // by all lanes
      rescale[r] = 1.f;
      if (unsafe.has(r)) {
        update_row<Exponent::kSubtractFirst>(accS, r, maximum);
      } else if (kept) {
        keep_row(accS, r);
      } else {
        update_row<Exponent::kMultiplyAdd>(accS, r, maximum);
      }
    }
  }

  /// Some row of the warp has met no key yet.
  FLASH_DEVICE bool any_empty() const {
    return __any_sync(0xffffffffu, fminf(row_max[0], row_max[1]) == -INFINITY);
  }
  FLASH_DEVICE bool any_rescale() const {
    return __any_sync(0xffffffffu, rescale[0] != 1.f || rescale[1] != 1.f);
  }
  /// l of the whole row, from the four threads that hold it.
  FLASH_DEVICE void reduce_sums() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_sum[r] += __shfl_xor_sync(0xffffffffu, row_sum[r], 1);
      row_sum[r] += __shfl_xor_sync(0xffffffffu, row_sum[r], 2);
    }
  }
  /// A key with this score and no value, into a complete l; returns 2^(c (m - m')), which O needs.
  FLASH_DEVICE float add_sink(int r, float score) {
    const float base = base_of(fmaxf(row_max[r], score));
    const float factor = exp2_approx((row_max[r] - base) * scale_log2);
    row_sum[r] = row_sum[r] * factor + exp2_approx((score - base) * scale_log2);
    row_max[r] = fmaxf(row_max[r], score);
    return factor;
  }
  FLASH_DEVICE float inverse_sum(int r) const { return row_sum[r] == 0.f ? 0.f : 1.f / row_sum[r]; }
  /// Natural logarithm of sum exp(scale q.k); -inf for an empty row.
  FLASH_DEVICE float lse(int r, float softmax_scale) const {
    return row_sum[r] == 0.f ? -INFINITY : row_max[r] * softmax_scale + logf(row_sum[r]);
  }
  /// By complete l.
  FLASH_DEVICE UnsafeRows unsafe_rows() const {
    UnsafeRows rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) rows.lanes[r] = __ballot_sync(0xffffffffu, !is_safe(r));
    return rows;
  }

 private:
  FLASH_DEVICE bool is_safe(int r) const {
    return row_max[r] == -INFINITY ||
           (row_sum[r] < kSafeSum && fabsf(row_max[r] * scale_log2) <= kSafeLog2);
  }
  /// `maximum`: of S.
  template <Exponent kExponent, int kCount>
  FLASH_DEVICE void update_row(float (&accS)[kCount], int r, float maximum) {
    maximum = fmaxf(maximum, row_max[r]);
    if ((row_max[r] - maximum) * scale_log2 >= -kStaleLog2) maximum = row_max[r];
    const float base = base_of(maximum);
    rescale[r] = exp2_approx((row_max[r] - base) * scale_log2);
    row_max[r] = maximum;
    row_sum[r] = row_sum[r] * rescale[r] + exponentials<kExponent>(accS, r, base);
  }
  template <int kCount>
  FLASH_DEVICE void keep_row(float (&accS)[kCount], int r) {
    row_sum[r] += exponentials<Exponent::kMultiplyAdd>(accS, r, row_max[r]);
  }
};

}  // namespace flash::cuda::sm90
