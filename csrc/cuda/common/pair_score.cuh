// SPDX-License-Identifier: BSD-3-Clause
// The features of attention as the kernels of this folder and of simt/ see them: one (query, key)
// pair at a time.
#pragma once

#include "attention/params.h"
#include "cuda/common/element.cuh"

namespace flash::cuda {

/// Everything about the scores of one (sequence, query head). kPlain compiles to the scale alone.
template <class Element_, Variant kVariant>
struct PairScore {
  using Element = Element_;
  using Real = Accumulator<Element>;
  static constexpr bool kGeneral = kVariant == Variant::kGeneral;

  const Features& features;
  Real scale;
  int batch, head, diagonal_offset;
  DropoutStream dropout;

  __device__ __forceinline__ PairScore(const ForwardParams& p, int batch, int head,
                                       const Sequence& q, const Sequence& k)
      : features(p.features),
        scale(Real(p.softmax_scale)),
        batch(batch),
        head(head),
        diagonal_offset(p.mask.diagonal_offset(q.length, k.length)),
        dropout{} {
    if constexpr (kGeneral) {
      if (features.dropout.enabled())
        dropout = DropoutStream::of(features.dropout, batch, head, p.num_heads);
    }
  }

  /// q.k -> the score that enters the softmax, before the interval mask.
  __device__ __forceinline__ ModifiedScore<Real> operator()(Real dot, int q, int k) const {
    if constexpr (kGeneral) {
      const ScorePlace place{features.score_mod, {batch, head, q, k}, diagonal_offset, Widen{}};
      return features.score_mod.template forward<Real, Real>(dot * scale, place);
    } else {
      return {dot * scale, Real(1)};
    }
  }
  __device__ __forceinline__ bool drops() const { return kGeneral && features.dropout.enabled(); }
  /// 1 / (1 - p)
  __device__ __forceinline__ Real keep_scale() const {
    return drops() ? Real(features.dropout.scale) : Real(1);
  }
  __device__ __forceinline__ bool keeps(int q, int k) const { return dropout.keep(q, k); }

  // The backward carries a weight P >= 0 with the sign bit set where dropout drops the pair, so
  // that Philox runs once per pair and pass.

  /// P = exp(score - lse), 0 where the pair is masked; `slope` = d(score) / d(scale q.k).
  __device__ __forceinline__ Real signed_weight(Real dot, int q, int k, bool kept, Real lse,
                                                Real& slope) const {
    if constexpr (kGeneral) {
      slope = 1;
      if (!kept) return Real(0);
    }
    const ModifiedScore<Real> modified = (*this)(dot, q, k);
    slope = modified.slope;
    // Not above 0: where scores are huge, rounding can put one of them far above the lse.
    const Real exponent = modified.score - lse > 0 ? Real(0) : modified.score - lse;
    const Real weight = kept ? exp_of(exponent) : Real(0);
    if constexpr (kGeneral) {
      if (drops() && !keeps(q, k)) return copysign(weight, Real(-1));
    }
    return weight;
  }
  /// keep P
  __device__ __forceinline__ Real kept_weight(Real signed_weight) const {
    if constexpr (kGeneral) return signed_weight <= 0 ? Real(0) : signed_weight;
    return signed_weight;
  }
  /// keep / (1 - p) P
  __device__ __forceinline__ Real after_dropout(Real signed_weight) const {
    return kept_weight(signed_weight) * keep_scale();
  }
  /// dS = P o (keep / (1 - p) dP - delta); exactly 0 where P is, whatever dP is.
  __device__ __forceinline__ Real gradient(Real signed_weight, Real dp, Real delta) const {
    Real weight = signed_weight;
    if constexpr (kGeneral) {
      if (drops()) {
        dp = signbit(weight) ? Real(0) : dp * keep_scale();
        weight = fabs(weight);
      }
    }
    return weight == 0 ? Real(0) : weight * (dp - delta);
  }

 private:
  using ScorePlace = ScalarPlace<Real, Element, Widen>;
};

/// Keys that a mask or a bias which is the same for every query takes away from all of them. They
/// are read as 0, so that what lies in their memory cannot reach a result (numerics, contract 3).
template <class Element, Variant kVariant>
struct AttendedKeys {
  const ScoreMod& mod;
  int batch, head;

  __device__ __forceinline__ bool operator()(int k) const {
    if constexpr (kVariant == Variant::kPlain) {
      return true;
    } else {
      const ScoreCoord c{batch, head, 0, k};
      if (mod.mask.data && mod.mask.q_stride == 0 && !mod.mask_keeps(c)) return false;
      if (!mod.bias.data || mod.bias.q_stride != 0) return true;
      using Real = Accumulator<Element>;
      return mod.template bias_at<Real, Element>(c, Widen{}) != Real(-INFINITY);
    }
  }
};

/// lse as the backward reads it: rows without a key, and rows outside, have weights exp(s - inf) =
/// 0.
template <class Real>
__device__ __forceinline__ Real lse_of(const RowView& view, const Sequence& s, int head, int q) {
  if (q >= s.length) return Real(INFINITY);
  const Real lse = static_cast<const Real*>(view.data)[view.offset(s, head) + q];
  return lse == Real(-INFINITY) ? Real(INFINITY) : lse;
}

/// delta = rowsum(dO o O) - dLSE; there is none where the weights themselves are differentiated.
template <class Real>
__device__ __forceinline__ Real delta_of(const RowView& view, const Sequence& s, int head, int q) {
  if (!view.data || q >= s.length) return Real(0);
  return static_cast<const Real*>(view.data)[view.offset(s, head) + q];
}

/// How the CTAs of simt/ and sm80/ are numbered: panels fastest, then, as a rule, the blocks of
/// rows of one head after another, which share its K and V in L2. Under a causal mask blocks differ
/// in length: the longest ones of all heads go first, or the last head's would run on alone.
struct CtaGrid {
  int panels, blocks, heads, batch;
  bool by_block = false, ascending = false;

  enum class Longest { kLastRows, kFirstRows };  // under a causal mask

  static CtaGrid of(const ForwardParams& p, int panels, int blocks, int heads, Longest longest) {
    const bool causal = p.mask.window_right < IntervalMask::kUnbounded &&
                        p.mask.window_left >= IntervalMask::kUnbounded;
    return {panels, blocks, heads, p.batch, causal, longest == Longest::kFirstRows};
  }
  int64_t ctas() const { return int64_t(panels) * blocks * heads * batch; }
};

/// The block of rows and the column panel that such a CTA works on.
struct CtaPlace {
  int panel, block, head, batch;

  static __device__ __forceinline__ CtaPlace of(unsigned index, const CtaGrid& grid) {
    CtaPlace place;
    place.panel = int(index % grid.panels);
    index /= grid.panels;
    const unsigned sets = unsigned(grid.heads) * grid.batch;
    const unsigned set = grid.by_block ? index % sets : index / grid.blocks;
    const int block = int(grid.by_block ? index / sets : index % grid.blocks);
    place.block = grid.ascending ? block : grid.blocks - 1 - block;
    place.head = int(set % grid.heads);
    place.batch = int(set / grid.heads);
    return place;
  }
};

}  // namespace flash::cuda
