// SPDX-License-Identifier: BSD-3-Clause
//
// Chunks of query rows: into operands, with lse and delta, and out of them. O(N d) work beside the
// O(N^2 d) of backward_block.h.
#pragma once

#if defined(FLASH_CPU_BF16)
#include "cpu/backward_pairs.h"
#else
#include "cpu/backward_panels.h"
#endif

namespace flash::cpu {
namespace {

/// rowsum(dO o O) of one row. O of a row that keeps nothing is 0, and its dO may be anything.
Real output_product(DType dtype, const void* out, int64_t out_at, const void* dout, int64_t dout_at,
                    int width) {
  constexpr int kPiece = 4 * kLanes;
  Vector sum = splat(0);
  for (int c = 0; c < width; c += kPiece) {
    alignas(64) Real o[kPiece] = {}, cotangents[kPiece] = {};
    read_row(dtype, out, out_at + c, 1, smaller(kPiece, width - c), o);
    read_row(dtype, dout, dout_at + c, 1, smaller(kPiece, width - c), cotangents);
    for (int x = 0; x < kPiece; x += kLanes) {
      sum += select(load(o + x) == splat(0), splat(0), load(o + x) * load(cotangents + x));
    }
  }
  return sum_of_lanes(sum);
}

/// The rows of a chunk; lse, delta; zero sums. A row with an infinite lse attends nothing: zeros
/// stand for it. lse is in units of log2 where the scores will be.
void prepare_chunk(const KvHead& head, const Chunk& chunk) {
  const GradientTask& task = head.task;
  const ForwardParams& p = task.p;
  const int h = head.query_head(chunk.head);
  const Real* lse = static_cast<const Real*>(p.lse.data) + p.lse.offset(head.q_rows, h);
  const int rows = round_up(chunk.rows, kRowStep);
  uint8_t flags = 0;
  for (int i = 0; i < rows; ++i) {
    const int64_t row = chunk.first_row + i;
    const bool is_row = i < chunk.rows;
    const bool is_empty = !is_row || lse[row] == kInfinity || lse[row] == -kInfinity;
    if (is_row && is_empty) flags |= Chunk::kHasEmptyRow;
    const int64_t q_at = p.q.offset(head.q_rows, h) + row * p.q.row_stride;
    put_row(p.dtype, is_empty ? nullptr : p.q.data, q_at, p.head_dim, i, chunk.q);
    Real delta = 0;
    if (is_row && task.dlse.data) {
      delta -= static_cast<const Real*>(task.dlse.data)[task.dlse.offset(head.q_rows, h) + row];
    }
    if (task.dout.data) {
      const int64_t at = task.dout.offset(head.q_rows, h) + row * task.dout.row_stride;
      put_row(p.dtype, is_empty ? nullptr : task.dout.data, at, p.head_dim_v, i, chunk.dout);
      if (!is_empty) {
        delta += output_product(p.dtype, p.out.data,
                                p.out.offset(head.q_rows, h) + row * p.out.row_stride,
                                task.dout.data, at, p.head_dim_v);
      }
    }
    chunk.row_sums[i] = 0;
    chunk.delta[i] = delta;
    chunk.lse[i] = is_empty                            ? kInfinity
                   : head.variant == Variant::kGeneral ? lse[row]
                                                       : lse[row] * kLog2E;
  }
  bool is_finite = finish_rows(rows, p.head_dim, chunk.q);
  if (task.dout.data) is_finite &= finish_rows(rows, p.head_dim_v, chunk.dout);
  if (!is_finite) flags |= Chunk::kNotFinite;
  *chunk.flags = flags;
  const Range keys = head.mask.any_keys(chunk.first_row, chunk.first_row + chunk.rows);
  *chunk.blocks_done = keys.begin / kBlockKeys;
  if (task.dq.data) std::memset(chunk.dq, 0, sizeof(Real) * head.scratch.sizes.dq);
}

/// dQ of a chunk, or the gradient of lse, to where it was asked for.
void store_chunk(const KvHead& head, const Chunk& chunk) {
  const GradientTask& task = head.task;
  const int h = head.query_head(chunk.head);
  for (int i = 0; i < chunk.rows; ++i) {
    const int64_t row = chunk.first_row + i;
    if (task.dq.data) {
      take_row(task.p.dtype, chunk.dq, i, task.p.head_dim, task.dq.data,
               task.dq.offset(head.q_rows, h) + row * task.dq.row_stride);
    }
    if (task.lse_gradient.data) {
      Real* to =
          static_cast<Real*>(task.lse_gradient.data) + task.lse_gradient.offset(head.q_rows, h);
      to[row] = -chunk.row_sums[i];
    }
  }
}

}  // namespace
}  // namespace flash::cpu
