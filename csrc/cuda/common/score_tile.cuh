// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "cuda/common/pair_score.cuh"
#include "primitives/fma_product.cuh"

namespace flash::cuda {

/// Where a score of a tile stands, and the lse of its row.
template <class Real>
struct TilePlace {
  int q, k;
  bool kept;  ///< by the interval mask; and inside: features have no values elsewhere
  Real lse;
};

/// A tile of P, then of dS, in shared memory, for kernels that recompute P from lse. Without
/// features the arithmetic of a pair is unrolled over the registers; with them it is a loop over
/// shared memory: a hundred instructions per pair would neither fit the registers nor the
/// instruction cache.
template <class Tile, int kCols, Variant kVariant>
struct ScoreTile {
  using Real = typename Tile::Real;
  using Registers = typename Tile::template Registers<kCols>;
  static constexpr bool kGeneral = kVariant == Variant::kGeneral;

  FmaExchange<Tile, kCols> exchange;
  /// Derivatives of the softcap, each thread's own.
  Real slopes[kGeneral ? kCols / 8 : 1][kGeneral ? Tile::kThreads : 1][Tile::kThreadRows];

  /// P, signed as PairScore says, from dot products; place(i, j) -> TilePlace.
  template <class Score, class Place>
  __device__ __forceinline__ void write_weights(const Score& score, const Registers& dots,
                                                Place place) {
    Real slope;
    if constexpr (!kGeneral) {
      exchange.write([&](int i, int j) {
        const TilePlace<Real> at = place(i, j);
        return score.signed_weight(dots[i][j], at.q, at.k, at.kept, at.lse, slope);
      });
    } else {
      exchange.write([&](int i, int j) { return dots[i][j]; });
      exchange.update_in_loop([&](int i, int j, Real dot) {
        const TilePlace<Real> at = place(i, j);
        const Real weight = score.signed_weight(dot, at.q, at.k, at.kept, at.lse, slope);
        if (score.features.score_mod.has_softcap()) slopes[j][threadIdx.x][i] = slope;
        return weight;
      });
    }
  }

  /// dL/d(scale q.k) in place of P; gradient(i, j, P) -> dS.
  template <class Score, class Gradient>
  __device__ __forceinline__ void write_gradients(const Score& score, Gradient gradient) {
    exchange.update([&](int i, int j, Real weight) {
      const Real ds = gradient(i, j, weight);
      if constexpr (kGeneral) {
        if (score.features.score_mod.has_softcap())
          return score.features.score_mod.backward(ds, slopes[j][threadIdx.x][i]);
      }
      return ds;
    });
  }
};

}  // namespace flash::cuda
