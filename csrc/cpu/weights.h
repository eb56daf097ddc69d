// SPDX-License-Identifier: BSD-3-Clause
//
// Attention weights W = exp(s - lse), after dropout, for each head or as the mean over the heads;
// the mean is taken block by block, so no map of one head exists. The backward is the backward of
// attention with dP = dW and delta = 0 (GradientTask).
//
// A unit of work is kWeightRows rows of one head, or of all heads, against all keys. Scratch is a
// fixed tile on the stack: head_dim is taken panel by panel.
#pragma once

#include "cpu/backward_run.h"

namespace flash::cpu {
namespace {

constexpr int kWeightRows = 8 * kPanelRows;
static_assert(kWeightRows % kDropoutRows == 0);

struct WeightsTile {
  alignas(64) Real q[kWeightRows * kPanel];
  alignas(64) Real k[kBlockKeys * kPanel], k_t[kBlockKeys * kPanel];
  alignas(64) Real scores[kWeightRows * kBlockKeys];  ///< [panel of keys][row][kPanel]
  alignas(64) Real sums[kWeightRows * kBlockKeys];    ///< (rows, keys)
  PairRow row;

  Real* score(int i, int j) {
    return scores + (j / kPanel * kWeightRows + i) * kPanel + j % kPanel;
  }
};

/// Rows [q_begin, q_begin + rows) of sequence b.
struct WeightsUnit {
  const WeightsParams& p;
  int batch, q_begin, rows;
  Sequence q_rows, k_rows;
  IntervalMask mask;
};

/// scores = softmax_scale Q K^T of one head with the keys from k_begin on.
void score_weights_tile(const WeightsUnit& unit, int h, int k_begin, WeightsTile& tile) {
  const WeightsParams& p = unit.p;
  const int keys = smaller(kBlockKeys, unit.mask.seqlen_k - k_begin);
  const int64_t q = p.q.offset(unit.q_rows, h) + unit.q_begin * p.q.row_stride;
  const int64_t k = p.k.offset(unit.k_rows, h / p.gqa_ratio()) + k_begin * p.k.row_stride;
  std::memset(tile.q, 0, sizeof tile.q);
  std::memset(tile.k, 0, sizeof tile.k);
  std::memset(tile.scores, 0, sizeof tile.scores);
  for (int d = 0; d < p.head_dim; d += kPanel) {
    const int width = smaller(kPanel, p.head_dim - d);
    for (int i = 0; i < unit.rows; ++i) {
      read_row(p.dtype, p.q.data, q + i * p.q.row_stride + d, 1, width, tile.q + i * kPanel);
    }
    for (int j = 0; j < keys; ++j) {
      read_row(p.dtype, p.k.data, k + j * p.k.row_stride + d, 1, width, tile.k + j * kPanel);
    }
    transpose_block(tile.k, width, Real(p.softmax_scale), tile.k_t);
    for (int j = 0; j < keys; j += kPanel) {
      add_product<kPanelVectors>(tile.q, kPanel, 1, round_up(unit.rows, 2), tile.k_t + j * width,
                                 width, tile.score(0, j));
    }
  }
}

/// Adds the weights of one head, times `factor`, to the sums.
void add_head_weights(const WeightsUnit& unit, int h, int k_begin, Real factor, WeightsTile& tile) {
  const WeightsParams& p = unit.p;
  const Range keys = unit.mask.any_keys(unit.q_begin, unit.q_begin + unit.rows);
  if (keys.begin >= k_begin + kBlockKeys || keys.end <= k_begin) return;
  score_weights_tile(unit, h, k_begin, tile);
  const Real* lse = static_cast<const Real*>(p.lse.data) + p.lse.offset(unit.q_rows, h);
  const bool has_dropout = p.features.dropout.enabled();
  const Range block{0, smaller(kBlockKeys, unit.mask.seqlen_k - k_begin)};
  KeyLanes lanes(p, unit.mask, unit.batch, h, k_begin, block, tile.row);
  for (int i = 0; i < unit.rows; ++i) {
    const Real row_lse = lse[unit.q_begin + i];
    const KeyRow row = lanes.enter_row(unit.q_begin + i, row_lse);
    for (int j = 0; j < kBlockKeys; j += kLanes) {
      const WeightVector w = row.weigh(p.features.score_mod, j, load(tile.score(i, j)), row_lse,
                                       /*lse_is_theirs=*/false);
      Vector weight = w.weight * splat(factor);
      if (has_dropout) weight = select(w.dropped, splat(0), weight * row.dropout_factor(j));
      Real* sum = tile.sums + i * kBlockKeys + j;
      store(sum, load(sum) + weight);
    }
  }
}

/// All weights of rows [q_begin, q_begin + kWeightRows) of sequence b: of head h, or the mean of
/// all heads. Rows and keys beyond the lengths of the sequence weigh 0.
void run_weights_unit(const WeightsParams& p, int b, int h, int q_begin, WeightsTile& tile) {
  const Sequence q_rows = Sequence::of(p.q_layout, b), k_rows = Sequence::of(p.k_layout, b);
  const int rows = smaller(kWeightRows, p.q_layout.max - q_begin);
  const int used = larger(smaller(rows, q_rows.length - q_begin), 0);
  const WeightsUnit unit{p, b, q_begin, used, q_rows, k_rows, p.mask_of(q_rows, k_rows)};
  const int64_t heads = p.average ? 1 : p.num_heads, head = p.average ? 0 : h;
  for (int k_begin = 0; k_begin < p.k_layout.max; k_begin += kBlockKeys) {
    std::memset(tile.sums, 0, sizeof tile.sums);
    if (used > 0 && k_begin < k_rows.length) {
      if (p.average) {
        const Real factor = Real(1) / Real(p.num_heads);
        for (int each = 0; each < p.num_heads; ++each) {
          add_head_weights(unit, each, k_begin, factor, tile);
        }
      } else {
        add_head_weights(unit, h, k_begin, Real(1), tile);
      }
    }
    for (int i = 0; i < rows; ++i) {
      const int64_t row = (b * heads + head) * p.q_layout.max + q_begin + i;
      write_row(p.dtype, p.weights, row * p.k_layout.max + k_begin,
                smaller(kBlockKeys, p.k_layout.max - k_begin), tile.sums + i * kBlockKeys);
    }
  }
}

void run_weights(const WeightsParams& p, const Launch& launch) {
  const int64_t chunks = (int64_t(p.q_layout.max) + kWeightRows - 1) / kWeightRows;
  const int64_t heads = p.average ? 1 : p.num_heads, units = p.batch * heads * chunks;
  Counter counter;
  auto work = [&](int) {
    WeightsTile tile;
    for (int64_t i = counter.take(); i < units; i = counter.take()) {
      const int64_t head = i / chunks;
      run_weights_unit(p, int(head / heads), int(head % heads), int(i % chunks) * kWeightRows,
                       tile);
    }
  };
  if (launch.workers && units > 1) {
    run_workers(launch, work);
  } else {
    work(0);
  }
}

GradientTask task_of(const WeightsBackwardParams& p) {
  return {.p = p,
          .dout = {},
          .dlse = {},
          .dweights = p.dweights,
          .average = p.average,
          .dq = p.dq,
          .dk = p.dk,
          .dv = {},
          .lse_gradient = p.dlse,
          .dbias = p.dbias,
          .bias_shape = p.bias_shape};
}
int64_t weights_backward_workspace_bytes(const WeightsBackwardParams& p, int num_workers) {
  return BackwardRun(task_of(p), num_workers).workspace_bytes();
}
void run_weights_backward(const WeightsBackwardParams& p, const Launch& launch) {
  const GradientTask task = task_of(p);
  BackwardRun(task, launch.workers ? launch.workers->count() : 1).run(launch);
}

}  // namespace
}  // namespace flash::cpu
