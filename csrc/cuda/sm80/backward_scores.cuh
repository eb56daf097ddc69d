// SPDX-License-Identifier: BSD-3-Clause
// The element-wise middle of the backward, on transposed tiles: rows are keys, columns are queries.
#pragma once

#include "cuda/sm80/scores.cuh"
#include "cuda/sm80/softmax.cuh"

namespace flash::cuda::sm80 {

/// What a query row brings along. lse = +inf gives every weight 0: a row that is outside or empty.
struct QueryRow {
  float lse, delta;
};

/// The score modifications of a tile of products, and d(score) / d(scale q.k) where it is not 1.
template <class Element, Variant kVariant, int kRows, int kCols>
FLASH_DEVICE void modify_scores(RegisterTile<kRows, kCols>& accS,
                                RegisterTile<kRows, kCols>& slopes,
                                const Scores<Element, kVariant>& scores, int first_k, int first_q) {
  if constexpr (kVariant == Variant::kGeneral)
    scores.template modify<BlockRows::kKeys>(accS, first_k, first_q,
                                             [&](int m, int n, const ScoreBlock& slope) {
                                               if (!scores.has_slopes()) return;
#pragma unroll
                                               for (int i = 0; i < ScoreBlock::kCount; ++i)
                                                 slopes.at[m][n + i / 4][i % 4] = slope.x[i];
                                             });
}

/// P^T = exp(S^T - lse), rounded to an operand. kOneOperation: as in OnlineSoftmax, if every lse is
/// small; otherwise the score is rounded as the forward rounded it, and lse taken off first.
template <class Element, bool kOneOperation, int kRows, int kCols>
FLASH_DEVICE void exponentiate(const RegisterTile<kRows, kCols>& accS, float unit,
                               const QueryRow* rows,
                               RegisterOperand<Element, kRows, kCols>& weights) {
  const float unit_log2 = unit * kLog2E;
#pragma unroll
  for (int n = 0; n < accS.kTilesN; ++n) {
    const float lse[2] = {rows[8 * n + lane_col()].lse, rows[8 * n + lane_col() + 1].lse};
    const auto weight = [&](float s, int e) {
      if constexpr (kOneOperation) return exp2_approx(fmaf(s, unit_log2, -lse[e] * kLog2E));
      // At most 0 by definition, also for a huge score that is recomputed an ulp higher.
      const float exponent = __fmul_rn(s, unit) - lse[e];
      return exp2_approx(exponent > 0.f ? 0.f : exponent * kLog2E);
    };
#pragma unroll
    for (int m = 0; m < accS.kTilesM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        weights.at[m][n / 2][n % 2 * 2 + half] = pack<Element>(
            weight(accS.at[m][n][2 * half], 0), weight(accS.at[m][n][2 * half + 1], 1));
  }
}

/// P^T with dropped weights marked by a minus sign.
template <class Element, Variant kVariant, int kRows, int kCols>
FLASH_DEVICE RegisterOperand<Element, kRows, kCols> weights_of(
    const RegisterTile<kRows, kCols>& accS, const Scores<Element, kVariant>& scores,
    const QueryRow* rows, bool is_small, int first_k, int first_q) {
  RegisterOperand<Element, kRows, kCols> weights;
  if (is_small)
    exponentiate<Element, true>(accS, scores.unit, rows, weights);
  else
    exponentiate<Element, false>(accS, scores.unit, rows, weights);
  if constexpr (kVariant == Variant::kGeneral)
    if (scores.has_dropout()) scores.mark_dropped(weights, first_k, first_q);
  return weights;
}

/// dP -> dS = P o (dP - delta), through dropout and score modification. Dropped weights carry a
/// minus sign; slopes = d(score) / d(scale q.k).
template <class Element, Variant kVariant, int kRows, int kCols>
FLASH_DEVICE void to_score_gradient(RegisterTile<kRows, kCols>& accdP,
                                    const RegisterOperand<Element, kRows, kCols>& weights,
                                    const RegisterTile<kRows, kCols>& slopes,
                                    const Scores<Element, kVariant>& scores, const QueryRow* rows) {
  float dropout_scale = 1.f;
  if constexpr (kVariant == Variant::kGeneral) dropout_scale = scores.dropout_scale();
#pragma unroll
  for (int n = 0; n < accdP.kTilesN; ++n) {
    const float delta[2] = {rows[8 * n + lane_col()].delta, rows[8 * n + lane_col() + 1].delta};
#pragma unroll
    for (int m = 0; m < accdP.kTilesM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 pair = unpack<Element>(weights.at[m][n / 2][n % 2 * 2 + half]);
        const float weight[2] = {pair.x, pair.y};
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& ds = accdP.at[m][n][2 * half + e];
          if constexpr (kVariant == Variant::kGeneral) {
            const float kept = signbit(weight[e]) ? 0.f : ds * dropout_scale;
            ds = fabsf(weight[e]) * (kept - delta[e]);
          } else {
            ds = weight[e] * (ds - delta[e]);
          }
        }
      }
  }
  if constexpr (kVariant == Variant::kGeneral) {
    if (!scores.has_slopes()) return;
#pragma unroll
    for (int m = 0; m < accdP.kTilesM; ++m)
#pragma unroll
      for (int n = 0; n < accdP.kTilesN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          accdP.at[m][n][e] = scores.backward(accdP.at[m][n][e], slopes.at[m][n][e]);
  }
}

/// Weights as the left operand of dV = (dropped P)^T dO: marked ones are 0.
template <Variant kVariant, class Weights>
struct KeptWeights {
  const Weights& weights;

  FLASH_DEVICE void load(uint32_t (&fragment)[4], int m, int k) const {
    weights.load(fragment, m, k);
    if constexpr (kVariant == Variant::kGeneral)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        fragment[i] = positive_part<typename Weights::Element>(fragment[i]);
  }
};

template <Variant kVariant, class Weights>
FLASH_DEVICE KeptWeights<kVariant, Weights> kept(const Weights& weights) {
  return {weights};
}

}  // namespace flash::cuda::sm80
