// SPDX-License-Identifier: BSD-3-Clause
// Shards of a sequence: the masks between all pairs of runs, put together, are the mask of the
// whole sequence, and cover each pair once.
#include "attention/position_runs.h"

#include <initializer_list>
#include <vector>

#include "check.h"

using flash::IntervalMask;
using flash::PositionRun;
using flash::run_mask;

namespace {

constexpr int kUnbounded = IntervalMask::kUnbounded;
enum class Layout { kContiguous, kZigzag, kStriped };

/// Chunk c of C holds the positions [c N / C, (c + 1) N / C): lengths need not divide.
PositionRun chunk(int seqlen, int c, int num_chunks) {
  const int begin = seqlen * c / num_chunks, end = seqlen * (c + 1) / num_chunks;
  return {begin, end - begin, 1};
}

std::vector<PositionRun> runs_of(Layout layout, int seqlen, int rank, int world) {
  switch (layout) {
    case Layout::kContiguous:
      return {chunk(seqlen, rank, world)};
    case Layout::kZigzag:
      return {chunk(seqlen, rank, 2 * world), chunk(seqlen, 2 * world - 1 - rank, 2 * world)};
    case Layout::kStriped:
      return {{rank, rank < seqlen ? (seqlen - rank + world - 1) / world : 0, world}};
  }
  return {};
}

void check_shards(Layout layout, int world, int seqlen_q, int seqlen_k, int lower, int upper) {
  std::vector<int> times(size_t(seqlen_q) * seqlen_k, 0);
  for (int rank = 0; rank < world; ++rank) {
    for (PositionRun queries : runs_of(layout, seqlen_q, rank, world)) {
      for (int owner = 0; owner < world; ++owner) {
        for (PositionRun keys : runs_of(layout, seqlen_k, owner, world)) {
          const IntervalMask mask = run_mask(queries, keys, lower, upper);
          CHECK(mask.seqlen_q == queries.length && mask.seqlen_k == keys.length);
          for (int i = 0; i < queries.length; ++i) {
            for (int j = 0; j < keys.length; ++j) {
              const int q = queries.start + i * queries.stride;
              const int k = keys.start + j * keys.stride;
              const bool above = lower == -kUnbounded || k >= q + lower;
              const bool below = upper == kUnbounded || k <= q + upper;
              CHECK(mask.keep(i, j) == (above && below));
              ++times[size_t(q) * seqlen_k + k];
            }
          }
        }
      }
    }
  }
  for (int count : times) CHECK(count == 1);
}

void check_floor_div() {
  for (int a = -20; a <= 20; ++a) {
    for (int b : {1, 2, 3, 7}) CHECK(flash::floor_div(a, b) == int(std::floor(double(a) / b)));
  }
}

}  // namespace

int main() {
  check_floor_div();
  int configurations = 0;
  for (Layout layout : {Layout::kContiguous, Layout::kZigzag, Layout::kStriped}) {
    for (int world : {1, 2, 3, 4}) {
      for (int seqlen_q : {1, 5, 24, 37}) {
        for (int seqlen_k : {1, 24, 53}) {
          for (int lower : {-kUnbounded, -9, 0, 3}) {
            for (int upper : {kUnbounded, 0, 4, -2}) {
              for (int diagonal : {0, seqlen_k - seqlen_q}) {
                check_shards(layout, world, seqlen_q, seqlen_k,
                             lower == -kUnbounded ? lower : lower + diagonal,
                             upper == kUnbounded ? upper : upper + diagonal);
                ++configurations;
              }
            }
          }
        }
      }
    }
  }
  std::printf("position_runs_test: %d configurations\n", configurations);
}
