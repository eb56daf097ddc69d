// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cmath>

#include "attention/platform.h"

namespace flash {

// Conventions, written once: lse is the natural logarithm of the sum of exp(score), in the
// accumulation type; a row that keeps no key has out = 0 and lse = -inf (lse = sink with a sink).

/// One row's running softmax (FlashAttention-2, Algorithm 1: m and l).
template <class Real>
struct OnlineSoftmaxRow {
  Real max = -INFINITY;
  Real sum = 0;

  /// Takes a block's row maximum; returns exp(m_old - m_new), by which O and the sum are
  /// multiplied.
  FLASH_HOST_DEVICE Real rescale(Real block_max) {
    const Real new_max = block_max > max ? block_max : max;
    const Real factor = new_max == -INFINITY ? Real(1) : std::exp(max - new_max);
    max = new_max;
    sum *= factor;
    return factor;
  }
  /// While every score was -inf (or NaN, which no maximum sees) the maximum stands for 0, so that
  /// -inf weighs 0 and NaN stays NaN.
  FLASH_HOST_DEVICE Real weight(Real s) const {
    return std::exp(s - (max == -INFINITY ? Real(0) : max));
  }
  /// A sink is a key with logit `sink` and no value: it joins the denominator only.
  FLASH_HOST_DEVICE void add_sink(Real sink) {
    rescale(sink);
    sum += weight(sink);
  }
  FLASH_HOST_DEVICE Real lse() const { return sum == 0 ? Real(-INFINITY) : max + std::log(sum); }
};

/// out = a.weight * out_a + b.weight * out_b merges two normalised partial results of the same
/// query row.
template <class Real>
struct MergeWeights {
  Real a, b, lse;
};

///   lse = log(exp(lse_a) + exp(lse_b)),  weight_x = exp(lse_x - lse); no exponent is ever
///   positive.
template <class Real>
FLASH_HOST_DEVICE MergeWeights<Real> merge_weights(Real lse_a, Real lse_b) {
  const bool a_is_larger = lse_a >= lse_b;
  const Real large = a_is_larger ? lse_a : lse_b;
  const Real small = a_is_larger ? lse_b : lse_a;
  if (large == -INFINITY && small == -INFINITY) return {Real(0), Real(0), Real(-INFINITY)};
  const Real ratio = std::exp(small - large);
  const Real weight_large = Real(1) / (Real(1) + ratio);
  const Real weight_small = ratio / (Real(1) + ratio);
  const Real lse = large + std::log1p(ratio);
  if (a_is_larger) return {weight_large, weight_small, lse};
  return {weight_small, weight_large, lse};
}

}  // namespace flash
