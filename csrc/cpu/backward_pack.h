// SPDX-License-Identifier: BSD-3-Clause
//
// Into the panels of a kv head and out of them: chunks of query rows, with lse and delta; blocks of
// keys. O(N d) work beside the O(N^2 d) of backward_block.h.
#pragma once

#include "cpu/gradient_task.h"

namespace flash::cpu {
namespace {

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
};

/// Packs the rows of a chunk; lse, delta; zero sums. A row with an infinite lse attends nothing:
/// zeros stand for it. lse is in units of log2 where the scores will be.
void prepare_chunk(const KvHead& head, const Chunk& chunk) {
  const GradientTask& task = head.task;
  const ForwardParams& p = task.p;
  const int h = head.query_head(chunk.head), dq_width = head.scratch.dq_width;
  const int dout_width = head.scratch.dout_width;
  constexpr int64_t kPanelStride = int64_t(kChunkQueries) * kPanel;
  const Real* lse = static_cast<const Real*>(p.lse.data) + p.lse.offset(head.q_rows, h);
  Vector poison = splat(0);
  uint8_t flags = 0;
  for (int i = 0; i < round_up(chunk.rows, kPanelRows); ++i) {
    const int64_t row = chunk.first_row + i;
    Real* q = chunk.q + i * kPanel;
    Real* dout = chunk.dout + i * kPanel;
    const bool is_row = i < chunk.rows;
    const bool is_empty = !is_row || lse[row] == kInfinity || lse[row] == -kInfinity;
    if (is_row && is_empty) flags |= Chunk::kHasEmptyRow;
    chunk.row_sums[i] = 0;
    Real delta = 0;
    if (is_row && task.dlse.data) {
      delta -= static_cast<const Real*>(task.dlse.data)[task.dlse.offset(head.q_rows, h) + row];
    }
    if (is_empty) {
      pack_zero_row(p.head_dim, q, kPanelStride);
      pack_zero_row(dout_width, dout, kPanelStride);
    } else {
      pack_row(p.dtype, p.q.data, p.q.offset(head.q_rows, h) + row * p.q.row_stride, p.head_dim, q,
               kPanelStride);
      if (task.dout.data) {
        pack_row(p.dtype, task.dout.data,
                 task.dout.offset(head.q_rows, h) + row * task.dout.row_stride, p.head_dim_v, dout,
                 kPanelStride);
        const int64_t out = p.out.offset(head.q_rows, h) + row * p.out.row_stride;
        Vector sum = splat(0);
        for (int c = 0; c < p.head_dim_v; c += kPanel) {
          alignas(64) Real values[kPanel] = {};
          read_row(p.dtype, p.out.data, out + c, 1, smaller(kPanel, p.head_dim_v - c), values);
          const Real* cotangents = dout + c / kPanel * kPanelStride;
          for (int x = 0; x < kPanel; x += kLanes) {
            // O of a row that keeps nothing is 0, and its dO may be anything.
            const Vector o = load(values + x);
            sum += select(o == splat(0), splat(0), o * load(cotangents + x));
          }
        }
        delta += sum_of_lanes(sum);
      } else {
        pack_zero_row(dout_width, dout, kPanelStride);
      }
      for (int c = 0; c < dq_width; c += kPanel) {
        poison += poison_of(q + c / kPanel * kPanelStride, kPanel);
      }
      for (int c = 0; c < dout_width; c += kPanel) {
        poison += poison_of(dout + c / kPanel * kPanelStride, kPanel);
      }
    }
    chunk.delta[i] = delta;
    chunk.lse[i] = is_empty                            ? kInfinity
                   : head.variant == Variant::kGeneral ? lse[row]
                                                       : lse[row] * kLog2E;
  }
  if (!is_finite(poison)) flags |= Chunk::kNotFinite;
  *chunk.flags = flags;
  const Range keys = head.mask.any_keys(chunk.first_row, chunk.first_row + chunk.rows);
  *chunk.blocks_done = keys.begin / kBlockKeys;
  if (task.dq.data) std::memset(chunk.dq, 0, sizeof(Real) * kChunkQueries * dq_width);
}

/// dQ of a chunk, or the gradient of lse, to where it was asked for.
void store_chunk(const KvHead& head, const Chunk& chunk) {
  const GradientTask& task = head.task;
  const int h = head.query_head(chunk.head);
  for (int i = 0; i < chunk.rows; ++i) {
    const int64_t row = chunk.first_row + i;
    if (task.dq.data) {
      unpack_row(task.p.dtype, chunk.dq + i * kPanel, int64_t(kChunkQueries) * kPanel,
                 task.p.head_dim, task.dq.data,
                 task.dq.offset(head.q_rows, h) + row * task.dq.row_stride);
    }
    if (task.lse_gradient.data) {
      Real* to =
          static_cast<Real*>(task.lse_gradient.data) + task.lse_gradient.offset(head.q_rows, h);
      to[row] = -chunk.row_sums[i];
    }
  }
}

/// Packs K and V of block n and clears its sums. Returns whether all of them are finite.
bool load_block(const KvHead& head, int n, const BlockScratch& block) {
  const GradientTask& task = head.task;
  const ForwardParams& p = task.p;
  const int64_t k_begin = int64_t(n) * kBlockKeys;
  const int keys = smaller(kBlockKeys, int(head.mask.seqlen_k - k_begin));
  constexpr int64_t kPanelStride = int64_t(kBlockKeys) * kPanel;
  Vector poison = splat(0);
  auto pack = [&](const TensorView& view, int width, Real* to) {
    const int64_t at = view.offset(head.k_rows, head.head_k) + k_begin * view.row_stride;
    for (int j = 0; j < keys; ++j) {
      pack_row(p.dtype, view.data, at + j * view.row_stride, width, to + j * kPanel, kPanelStride);
    }
    for (int j = keys; j < kBlockKeys; ++j) pack_zero_row(width, to + j * kPanel, kPanelStride);
    poison += poison_of(to, panels(width) * kPanelStride);
  };
  const Real factor =
      Real(p.softmax_scale) * (head.variant == Variant::kGeneral ? Real(1) : kLog2E);
  pack(p.k, p.head_dim, block.k);
  transpose_block(block.k, p.head_dim, factor, block.k_t);
  std::memset(block.dk, 0, sizeof(Real) * panels(p.head_dim) * kPanelStride);
  if (!task.of_weights()) {
    pack(p.v, p.head_dim_v, block.dv);
    transpose_block(block.dv, p.head_dim_v, Real(1), block.v_t);
    std::memset(block.dv, 0, sizeof(Real) * panels(p.head_dim_v) * kPanelStride);
  }
  return is_finite(poison);
}

void store_block(const KvHead& head, int n, const BlockScratch& block) {
  const GradientTask& task = head.task;
  const int64_t k_begin = int64_t(n) * kBlockKeys;
  const int keys = smaller(kBlockKeys, int(head.mask.seqlen_k - k_begin));
  auto unpack = [&](const TensorView& view, int width, const Real* from) {
    if (!view.data) return;
    const int64_t at = view.offset(head.k_rows, head.head_k) + k_begin * view.row_stride;
    for (int j = 0; j < keys; ++j) {
      unpack_row(task.p.dtype, from + j * kPanel, int64_t(kBlockKeys) * kPanel, width, view.data,
                 at + j * view.row_stride);
    }
  };
  unpack(task.dk, task.p.head_dim, block.dk);
  unpack(task.dv, task.p.head_dim_v, block.dv);
}

}  // namespace
}  // namespace flash::cpu
