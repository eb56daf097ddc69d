// SPDX-License-Identifier: BSD-3-Clause
//
// A kv head in work: its chunks of query rows, and the steps in which they meet blocks of keys.
#pragma once

#include "cpu/gradient_task.h"

namespace flash::cpu {
namespace {

/// Reals that the operands and sums of a chunk take.
struct ChunkSizes {
  int64_t q, dout, dq;
};

/// Some rows of one query head, as the steps want them.
struct Chunk {
  Real *q, *dout, *dq;           ///< operands and sums (ChunkSizes)
  Real *lse, *delta, *row_sums;  ///< per row; row_sums = rowsum(dS)
  int32_t* blocks_done;          ///< the next block of keys that may add to dq and row_sums
  uint8_t* flags;
  int head, first_row, rows;

  static constexpr uint8_t kHasEmptyRow = 1, kNotFinite = 2;
};

/// One kv head in work: the packed rows of all its query heads.
struct HeadScratch {
  int num_chunks, num_blocks;
  ChunkSizes sizes;
  Real *q, *dout, *dq, *lse, *delta, *row_sums, *slope_sums;
  int32_t* blocks_done;
  uint8_t* flags;

  HeadScratch(Arena& arena, const GradientTask& task, const ChunkSizes& chunk_sizes, int seqlen_q,
              int seqlen_k)
      : num_chunks((seqlen_q + kChunkQueries - 1) / kChunkQueries),
        num_blocks((seqlen_k + kBlockKeys - 1) / kBlockKeys),
        sizes(chunk_sizes) {
    const int64_t chunks = int64_t(task.p.gqa_ratio()) * num_chunks, rows = chunks * kChunkQueries;
    q = arena.take<Real>(chunks * sizes.q);
    dq = arena.take<Real>(chunks * sizes.dq);
    dout = arena.take<Real>(chunks * sizes.dout);
    lse = arena.take<Real>(rows);
    delta = arena.take<Real>(rows);
    row_sums = arena.take<Real>(rows);
    slope_sums = arena.take<Real>(int64_t(task.p.gqa_ratio()) * num_blocks);
    blocks_done = arena.take<int32_t>(chunks);
    flags = arena.take<uint8_t>(chunks);
  }
  Chunk chunk(int head, int c, int seqlen_q) const {
    const int64_t index = int64_t(head) * num_chunks + c, row = index * kChunkQueries;
    return {.q = q + index * sizes.q,
            .dout = dout + index * sizes.dout,
            .dq = dq + index * sizes.dq,
            .lse = lse + row,
            .delta = delta + row,
            .row_sums = row_sums + row,
            .blocks_done = blocks_done + index,
            .flags = flags + index,
            .head = head,
            .first_row = c * kChunkQueries,
            .rows = smaller(kChunkQueries, seqlen_q - c * kChunkQueries)};
  }
};

/// One kv head of one sequence.
struct KvHead {
  const GradientTask& task;
  const BiasGradient& bias;
  Variant variant;
  int batch, head_k;
  Sequence q_rows, k_rows;
  IntervalMask mask;
  HeadScratch scratch;

  int query_head(int g) const { return head_k * task.p.gqa_ratio() + g; }
  /// Of q.k: without features, scores are in units of log2.
  Real score_scale() const {
    return Real(task.p.softmax_scale) * (variant == Variant::kGeneral ? Real(1) : kLog2E);
  }
};

/// What weigh_pairs has to look at.
enum class Pairs { kAllKept, kInterval, kGeneral };

/// A chunk's rows and a block's keys, cut to those that meet. Rows count from the chunk's first,
/// keys from the block's.
struct Step {
  Chunk chunk;
  int k_begin;
  Range rows, keys;
  Pairs pairs;
  bool is_cut;      ///< not every pair is in the mask's interval
  bool covers_all;  ///< rows and keys are all there are
};

}  // namespace
}  // namespace flash::cpu
