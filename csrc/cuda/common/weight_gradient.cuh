// SPDX-License-Identifier: BSD-3-Clause
// Where dL/dP comes from: the attention's own backward multiplies dO V^T, the backward of the
// weights W is given dW. Kernels that serve both take the type of their parameters.
#pragma once

#include <type_traits>

#include "cuda/common/pair_score.cuh"

namespace flash::cuda {

template <class Params>
inline constexpr bool kGradientIsGiven = std::is_same_v<Params, WeightsBackwardParams>;

/// dW at a pair; the average over the heads passes its gradient on in equal parts.
template <class Element>
__device__ __forceinline__ Accumulator<Element> given_gradient(const WeightsBackwardParams& p,
                                                               ScoreCoord c) {
  using Real = Accumulator<Element>;
  if (c.q >= p.q_layout.max || c.k >= p.k_layout.max) return Real(0);
  const int64_t matrix = p.average ? c.batch : int64_t(c.batch) * p.num_heads + c.head;
  const int64_t at = (matrix * p.q_layout.max + c.q) * p.k_layout.max + c.k;
  const Real gradient = widen(static_cast<const Element*>(p.dweights)[at]);
  return p.average ? gradient / Real(p.num_heads) : gradient;
}

}  // namespace flash::cuda
