// SPDX-License-Identifier: BSD-3-Clause
//
// The two products of a block for a group of at most kFewQueries queries, as in decoding: with
// lanes = queries most lanes would be idle. Here lanes = head_dim; Q and O are (queries, row_step),
// rows padded to whole vectors. Scores and weights keep the layout of forward_block.h, one vector
// of queries a key, and so do all the steps between the products.
#pragma once

#include "cpu/tile.h"

namespace flash::cpu {
namespace {

constexpr int kFewQueries = kLanes < 4 ? kLanes : 4;

/// sums[l] = sum of the lanes of x[l], every one by the same tree of additions; destroys x.
template <int kStride = 1, int kCount = kLanes>
FLASH_INLINE Vector sum_rows(Vector (&x)[kLanes]) {
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    const IntVector low = exchange_indices(kStride, 0), high = exchange_indices(kStride, 1);
    FLASH_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      const Vector a = x[2 * i], b = x[2 * i + 1];
      x[i] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
    }
    return sum_rows<kStride * 2, kCount / 2>(x);
  }
}

/// The first `count` numbers at p, then zeros.
FLASH_INLINE Vector load_part(const Real* p, int count) {
  Vector x = splat(0);
  std::memcpy(&x, p, count * sizeof(Real));
  return x;
}

/// S^T (keys, kLanes) and the running maximum over its keys.
FLASH_NOINLINE void score_few(const Rows& k, const Real* q, int64_t row_step, int num_queries,
                              Real* s, Real* row_max) {
  const int whole = k.width / kLanes * kLanes;
  for (int j = 0; j < k.count; ++j) store(s + j * kLanes, splat(0));
  for (int first = 0; first < k.count; first += kLanes) {
    const Real* row[kLanes];
    for (int r = 0; r < kLanes; ++r) row[r] = k.data + smaller(first + r, k.count - 1) * k.stride;
    for (int r = 0; r < kLanes; ++r) prefetch(row[r] + kLanes * k.stride, k.width);
    for (int i = 0; i < num_queries; ++i) {
      Vector acc[kLanes];
      FLASH_UNROLL
      for (int r = 0; r < kLanes; ++r) acc[r] = splat(0);
      for (int d = 0; d < whole; d += kLanes) {
        const Vector query = load(q + i * row_step + d);
        FLASH_UNROLL
        for (int r = 0; r < kLanes; ++r) acc[r] = fma(load(row[r] + d), query, acc[r]);
      }
      if (whole < k.width) {
        const Vector query = load(q + i * row_step + whole);
        FLASH_UNROLL
        for (int r = 0; r < kLanes; ++r) {
          acc[r] = fma(load_part(row[r] + whole, k.width - whole), query, acc[r]);
        }
      }
      const Vector scores = sum_rows(acc);
      for (int r = 0; r < smaller(kLanes, k.count - first); ++r) {
        s[(first + r) * kLanes + i] = scores[r];
      }
    }
  }
  Vector max = load(row_max);
  for (int j = 0; j < k.count; ++j) max = largest(load(s + j * kLanes), max);
  store(row_max, max);
}

/// O[i][.] = alpha[i] O[i][.] + what sum(acc) adds to 0, for kRows queries and kVectors vectors of
/// columns.
template <int kRows, int kVectors, class Sum>
FLASH_INLINE void output_few_tile(Real* o, int64_t row_step, const Real* alpha, Sum&& sum) {
  VectorGroup<kVectors> acc[kRows];
  FLASH_UNROLL
  for (int i = 0; i < kRows; ++i) acc[i] = splat_group<kVectors>(0);
  sum(acc);
  FLASH_UNROLL
  for (int i = 0; i < kRows; ++i) {
    FLASH_UNROLL
    for (int x = 0; x < kVectors; ++x) {
      Real* out = o + i * row_step + x * kLanes;
      store(out, fma(load(out), broadcast(alpha + i), acc[i].x[x]));
    }
  }
}
/// O[i][c] = alpha[i] O[i][c] + sum_j P^T[j][i] V[j][c]
template <int kRows>
FLASH_NOINLINE void output_few(const Rows& v, const Real* p, Real* o, int64_t row_step,
                               const Real* alpha) {
  constexpr int kVectors = 4;
  int c = 0;
  for (; c + kVectors * kLanes <= v.width; c += kVectors * kLanes) {
    output_few_tile<kRows, kVectors>(o + c, row_step, alpha, [&](auto& acc) {
      multiply_tile(acc, p, 1, kLanes, v.data + c, v.stride, v.count);
    });
  }
  for (; c + kLanes <= v.width; c += kLanes) {
    output_few_tile<kRows, 1>(o + c, row_step, alpha, [&](auto& acc) {
      multiply_tile(acc, p, 1, kLanes, v.data + c, v.stride, v.count);
    });
  }
  if (c == v.width) return;
  output_few_tile<kRows, 1>(o + c, row_step, alpha, [&](auto& acc) {
    for (int j = 0; j < v.count; ++j) {
      const Vector columns = load_part(v.data + j * v.stride + c, v.width - c);
      FLASH_UNROLL
      for (int i = 0; i < kRows; ++i) {
        acc[i].x[0] = fma(broadcast(p + j * kLanes + i), columns, acc[i].x[0]);
      }
    }
  });
}

}  // namespace
}  // namespace flash::cpu
