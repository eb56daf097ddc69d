// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "attention/platform.h"

namespace flash {

/// Where a score stands: positions q and k inside the sequence.
struct ScoreCoord {
  int batch, head, q, k;
};

/// A tensor over (batch, heads, seqlen_q, seqlen_k); a stride of 0 broadcasts.
struct PairView {
  const void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, q_stride = 0, k_stride = 0;

  FLASH_HOST_DEVICE int64_t offset(ScoreCoord c) const {
    return c.batch * batch_stride + c.head * head_stride + c.q * q_stride + c.k * k_stride;
  }
};

/// A score after its modifications, and d(score) / d(softmax_scale q.k).
template <class Number>
struct ModifiedScore {
  Number score, slope;
};

// The features of a score, each a value beside its derivative, over any Number (float, double, a
// vector of queries). `Number` brings tanh_of(x), abs_of(x) by overload.

FLASH_HOST_DEVICE float tanh_of(float x) { return tanhf(x); }
FLASH_HOST_DEVICE double tanh_of(double x) { return tanh(x); }
FLASH_HOST_DEVICE float abs_of(float x) { return fabsf(x); }
FLASH_HOST_DEVICE double abs_of(double x) { return fabs(x); }

///   t = c tanh(s / c),   dt/ds = 1 - (t / c)^2
template <class Number, class Real>
FLASH_HOST_DEVICE ModifiedScore<Number> softcap_score(Number s, Real cap) {
  const Number t = tanh_of(s * (Real(1) / cap));
  return {t * cap, Real(1) - t * t};
}
///   s - slope |q + diagonal_offset - k|;   d/dslope = -|q + diagonal_offset - k|
template <class Number, class Slope>
FLASH_HOST_DEVICE Number alibi_term(Slope slope, Number distance) {
  return distance * -slope;
}

/// Every modification of a score, chosen by values that are equal for the whole launch (uniform
/// branches). Order (a contract): scale, softcap, bias and ALiBi, mask.
struct ScoreMod {
  double softcap = 0;  ///< 0: off
  PairView bias;       ///< added; float32 if bias_is_float32, else the dtype of q
  bool bias_is_float32 = false;
  PairView mask;                       ///< uint8: 0 drops the pair
  const void* alibi_slopes = nullptr;  ///< accumulation type, (num_heads) or (batch, num_heads)
  int64_t slopes_batch_stride = 0, slopes_head_stride = 0;

  /// A comparison of bits: one of doubles costs a GPU as much as many scores.
  FLASH_HOST_DEVICE bool has_softcap() const { return std::bit_cast<int64_t>(softcap) > 0; }
  FLASH_HOST_DEVICE bool enabled() const {
    return has_softcap() || bias.data || mask.data || alibi_slopes;
  }
  template <class Real>
  FLASH_HOST_DEVICE Real slope_of(int batch, int head) const {
    return static_cast<const Real*>(
        alibi_slopes)[batch * slopes_batch_stride + head * slopes_head_stride];
  }
  FLASH_HOST_DEVICE bool mask_keeps(ScoreCoord c) const {
    return static_cast<const uint8_t*>(mask.data)[mask.offset(c)] != 0;
  }
  /// The bias at c, widened to Real. `Element` is the dtype of q; widen(Element) -> Real.
  template <class Real, class Element, class Widen>
  FLASH_HOST_DEVICE Real bias_at(ScoreCoord c, Widen widen) const {
    const int64_t at = bias.offset(c);
    return bias_is_float32 ? Real(static_cast<const float*>(bias.data)[at])
                           : Real(widen(static_cast<const Element*>(bias.data)[at]));
  }

  /// s = softmax_scale q.k  ->  the score that enters the softmax. `at` answers for this place:
  ///   at.bias() -> Number,  at.distance() -> Number = |q + diagonal_offset - k|,
  ///   at.slope() -> Real or Number,   at.dropped(Number s) -> Number: -inf where the bool mask
  ///   drops.
  template <class Real, class Number, class Place>
  FLASH_HOST_DEVICE ModifiedScore<Number> forward(Number s, const Place& at) const {
    ModifiedScore<Number> result{s, Number{} + Real(1)};
    if (has_softcap()) result = softcap_score<Number, Real>(s, Real(softcap));
    result.score = shifted<Real>(result.score, at);
    return result;
  }
  /// The part of forward behind the softcap, which has no slope.
  template <class Real, class Number, class Place>
  FLASH_HOST_DEVICE Number shifted(Number score, const Place& at) const {
    if (bias.data) score = score + at.bias();
    if (alibi_slopes) score = score + alibi_term<Number>(at.slope(), at.distance());
    if (mask.data) score = at.dropped(score);
    return score;
  }
  /// dL/d(score) -> dL/d(softmax_scale q.k), with the slope that forward returned.
  template <class Number>
  FLASH_HOST_DEVICE Number backward(Number ds, Number slope) const {
    return has_softcap() ? ds * slope : ds;
  }
};

/// One pair of scalars as a Place of ScoreMod::forward: what CUDA kernels and tests use.
template <class Real, class Element, class Widen>
struct ScalarPlace {
  const ScoreMod& mod;
  ScoreCoord c;
  int diagonal_offset;
  Widen widen;

  FLASH_HOST_DEVICE Real bias() const { return mod.template bias_at<Real, Element>(c, widen); }
  FLASH_HOST_DEVICE Real distance() const { return abs_of(Real(c.q + diagonal_offset - c.k)); }
  FLASH_HOST_DEVICE Real slope() const { return mod.template slope_of<Real>(c.batch, c.head); }
  FLASH_HOST_DEVICE Real dropped(Real s) const { return mod.mask_keeps(c) ? s : Real(-INFINITY); }
};

}  // namespace flash
