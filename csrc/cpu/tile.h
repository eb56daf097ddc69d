// SPDX-License-Identifier: BSD-3-Clause
//
// Tile products with lanes = queries. A group is up to kQueryVectors vectors of queries; an array
// over a group, [row][group], is "transposed": Q^T is (head_dim, group), S^T is (keys, group).
// There is one inner product, multiply_tile, and everything else is how its accumulators begin and
// end:
//     S^T[j][.] = sum_d K[j][d] Q^T[d][.]            score_tiles
//     O^T[c][.] = alpha[.] O^T[c][.] + sum_j V[j][c] P^T[j][.]     output_tiles
// K and V are read where they lie, one scalar at a time, broadcast. Functions are templates over
// the number of vectors, for groups that are not full; a lane's bits do not depend on it.
#pragma once

#include "cpu/vector.h"

namespace flash::cpu {
namespace {

// Registers: kTileRows x kQueryVectors accumulators + kQueryVectors operands + 1 broadcast <= 32
// (16 without AVX-512 or NEON).
constexpr int kQueryVectors = 3;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif
/// Whether this object is for bf16, its products in pairs (pair_product.h).
#if defined(FLASH_CPU_BF16)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif
constexpr int kGroupQueries = kQueryVectors * kLanes;
/// Keys of a block. Blocks start at absolute multiples of it, so that a row's sums are cut at the
/// same keys whichever rows are computed with it.
constexpr int kBlockKeys = kHasPairs ? 128 : 64;
/// Distance of rows in a block of scores: more than kBlockKeys, so that a column of it is spread
/// over the sets of L1.
constexpr int kScorePitch = kBlockKeys + 16;
constexpr int kPairDepth = 32;  ///< of a product in pairs: a row of a tile register (amx.h)

FLASH_INLINE int round_up(int x, int step) { return (x + step - 1) / step * step; }

/// `count` rows of `width` numbers of K or V, where they lie.
struct Rows {
  const Real* data;
  int64_t stride;
  int count, width;
};
FLASH_INLINE void prefetch(const Real* row, int width) {
  for (int x = 0; x < width; x += 64 / int(sizeof(Real))) __builtin_prefetch(row + x);
}

/// One number per query of a group.
template <int kVectors>
struct VectorGroup {
  Vector x[kVectors];
};
template <int kVectors>
FLASH_INLINE VectorGroup<kVectors> load_group(const Real* p) {
  VectorGroup<kVectors> g;
  FLASH_UNROLL
  for (int v = 0; v < kVectors; ++v) g.x[v] = load(p + v * kLanes);
  return g;
}
template <int kVectors>
FLASH_INLINE void store_group(Real* p, const VectorGroup<kVectors>& g) {
  FLASH_UNROLL
  for (int v = 0; v < kVectors; ++v) store(p + v * kLanes, g.x[v]);
}
template <int kVectors>
FLASH_INLINE VectorGroup<kVectors> splat_group(Real value) {
  VectorGroup<kVectors> g;
  FLASH_UNROLL
  for (int v = 0; v < kVectors; ++v) g.x[v] = splat(value);
  return g;
}

/// acc[r][.] += sum_i left(r, i) right(i)[.], i ascending: the one inner product of all the
/// kernels. left(r, i) is the scalar at left + r * left_row + i * left_step, right(i) the vectors
/// at right + i * right_step.
template <int kRows, int kVectors>
FLASH_INLINE void multiply_tile(VectorGroup<kVectors> (&acc)[kRows], const Real* left,
                                int64_t left_row, int64_t left_step, const Real* right,
                                int64_t right_step, int count) {
#pragma GCC unroll 2
  for (int i = 0; i < count; ++i) {
    const VectorGroup<kVectors> b = load_group<kVectors>(right + i * right_step);
    FLASH_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vector a = broadcast(left + r * left_row + i * left_step);
      FLASH_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[r].x[v] = fma(a, b.x[v], acc[r].x[v]);
    }
  }
}

/// S^T[first + r][.] = k_(first + r) . Q^T for kRows keys, each given to epilogue(j, scores). Sums
/// of kChain products are added up: one chain of 256 was off by 7.4e-6 where a product in several
/// lanes was off by 0.8e-6. At head dim 128 it costs about 2 %.
template <int kRows, int kVectors, class Epilogue>
FLASH_INLINE void score_tile(const Rows& k, int first, const Real* q_t, Epilogue&& epilogue) {
  constexpr int kChain = 64, kPitch = kVectors * kLanes;
  const Real* rows = k.data + first * k.stride;
  VectorGroup<kVectors> acc[kRows];
  FLASH_UNROLL
  for (int r = 0; r < kRows; ++r) acc[r] = splat_group<kVectors>(0);
  multiply_tile(acc, rows, k.stride, 1, q_t, kPitch, k.width < kChain ? k.width : kChain);
  for (int d = kChain; d < k.width; d += kChain) {
    VectorGroup<kVectors> part[kRows];
    FLASH_UNROLL
    for (int r = 0; r < kRows; ++r) part[r] = splat_group<kVectors>(0);
    const int count = k.width - d < kChain ? k.width - d : kChain;
    multiply_tile(part, rows + d, k.stride, 1, q_t + int64_t(d) * kPitch, kPitch, count);
    FLASH_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FLASH_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[r].x[v] += part[r].x[v];
    }
  }
  FLASH_UNROLL
  for (int r = 0; r < kRows; ++r) epilogue(first + r, acc[r]);
}
/// The same for all rows of k, in order. q_t is (k.width, group).
template <int kVectors, class Epilogue>
FLASH_INLINE void score_tiles(const Rows& k, const Real* q_t, Epilogue&& epilogue) {
  int j = 0;
  for (; j + kTileRows <= k.count; j += kTileRows) {
    for (int r = 0; r < kTileRows; ++r) prefetch(k.data + (j + kTileRows + r) * k.stride, k.width);
    score_tile<kTileRows, kVectors>(k, j, q_t, epilogue);
  }
  for (; j < k.count; ++j) score_tile<1, kVectors>(k, j, q_t, epilogue);
}

/// O^T[c][.] = alpha[.] O^T[c][.] + sum_j V[j][c] P^T[j][.] for kRows columns of V. The block's sum
/// starts from 0: one chain over all the keys would round a common part of V the same way each time
/// (on a trained layer of 1024 keys, three times the error of this).
template <int kRows, int kVectors>
FLASH_INLINE void output_tile(const Rows& v, int first, const Real* p, Real* o_t,
                              const VectorGroup<kVectors>& alpha) {
  constexpr int kPitch = kVectors * kLanes;
  o_t += int64_t(first) * kPitch;
  VectorGroup<kVectors> acc[kRows];
  FLASH_UNROLL
  for (int r = 0; r < kRows; ++r) acc[r] = splat_group<kVectors>(0);
  multiply_tile(acc, v.data + first, 1, v.stride, p, kPitch, v.count);
  FLASH_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FLASH_UNROLL
    for (int x = 0; x < kVectors; ++x) {
      Real* out = o_t + r * kPitch + x * kLanes;
      store(out, fma(load(out), alpha.x[x], acc[r].x[x]));
    }
  }
}
/// The same for all columns of v. p is (v.count, group), o_t (v.width, group).
template <int kVectors>
FLASH_INLINE void output_tiles(const Rows& v, const Real* p, Real* o_t,
                               const VectorGroup<kVectors>& alpha) {
  int c = 0;
  for (; c + kTileRows <= v.width; c += kTileRows) {
    output_tile<kTileRows, kVectors>(v, c, p, o_t, alpha);
  }
  for (; c < v.width; ++c) output_tile<1, kVectors>(v, c, p, o_t, alpha);
}

}  // namespace
}  // namespace flash::cpu
