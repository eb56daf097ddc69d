// SPDX-License-Identifier: BSD-3-Clause
//
// The operands of the backward in panels of Reals (panel.h), and its five products on them.
// backward_pairs.h has the same names for bf16.
#pragma once

#include "cpu/backward_head.h"
#include "cpu/panel.h"

namespace flash::cpu {
namespace {

/// What a worker's thread needs while it makes products.
struct ProductScope {
  ProductScope() {}  // a scope, to the compiler
};
/// Rows of a step begin at multiples of this, and end there or with the chunk.
constexpr int kRowStep = kPanelRows;
constexpr int kRowsOfCut = kChunkQueries;  ///< a multiple of kRowStep
static_assert(kChunkQueries % kRowStep == 0);
constexpr int64_t kChunkPanel = int64_t(kChunkQueries) * kPanel;
constexpr int64_t kBlockPanel = int64_t(kBlockKeys) * kPanel;

/// Panels of a chunk are kChunkQueries rows apart.
ChunkSizes chunk_sizes(const GradientTask& task) {
  const int64_t of_q = panels(task.p.head_dim) * kChunkPanel;
  const int64_t of_v = panels(task.p.head_dim_v) * kChunkPanel;
  return {of_q, task.of_weights() ? 0 : of_v, task.dq.data ? of_q : 0};
}
/// Row i of Q or dO of a chunk; null: zeros.
void put_row(DType dtype, const void* data, int64_t at, int width, int i, Real* operand) {
  if (data) {
    pack_row(dtype, data, at, width, operand + i * kPanel, kChunkPanel);
  } else {
    pack_zero_row(width, operand + i * kPanel, kChunkPanel);
  }
}
/// To be called after the rows; whether all of them are finite.
bool finish_rows(int rows, int width, Real* operand) {
  Vector poison = splat(0);
  for (int c = 0; c < width; c += kPanel, operand += kChunkPanel)
    poison += poison_of(operand, int64_t(rows) * kPanel);
  return is_finite(poison);
}
/// Row i of dQ, to where it was asked for.
void take_row(DType dtype, const Real* dq, int i, int width, void* data, int64_t at) {
  unpack_row(dtype, dq + i * kPanel, kChunkPanel, width, data, at);
}

/// Of one worker: a block of keys and the pairs that it forms with a chunk of queries.
class BlockOperands {
 public:
  Real *p, *ds;  ///< (kChunkQueries, kScorePitch): S, then P; dP, then dS
  static constexpr Real scale_of_scores = 1;  ///< K^T has all of it

  BlockOperands(Arena& arena, const GradientTask& task)
      : head_dim_(task.p.head_dim), head_dim_v_(task.p.head_dim_v) {
    const int64_t d = panels(head_dim_), dv_panels = panels(head_dim_v_);
    p = arena.take<Real>(int64_t(kChunkQueries) * kScorePitch);
    ds = arena.take<Real>(int64_t(kChunkQueries) * kScorePitch);
    k_ = arena.take<Real>(d * kBlockPanel);
    k_t_ = arena.take<Real>(d * kBlockPanel);
    dk_ = arena.take<Real>(d * kBlockPanel);
    v_t_ = arena.take<Real>(dv_panels * kBlockPanel);
    dv_ = arena.take<Real>(dv_panels * kBlockPanel);
  }

  /// Packs K and V of block n and clears its sums. Returns whether all of them are finite.
  bool load_block(const KvHead& head, int n) {
    const GradientTask& task = head.task;
    const int64_t k_begin = int64_t(n) * kBlockKeys;
    const int keys = smaller(kBlockKeys, int(head.mask.seqlen_k - k_begin));
    Vector poison = splat(0);
    auto pack = [&](const TensorView& view, int width, Real* to) {
      const int64_t at = view.offset(head.k_rows, head.head_k) + k_begin * view.row_stride;
      for (int j = 0; j < keys; ++j) {
        pack_row(task.p.dtype, view.data, at + j * view.row_stride, width, to + j * kPanel,
                 kBlockPanel);
      }
      for (int j = keys; j < kBlockKeys; ++j) pack_zero_row(width, to + j * kPanel, kBlockPanel);
      poison += poison_of(to, panels(width) * kBlockPanel);
    };
    pack(task.p.k, head_dim_, k_);
    transpose_block(k_, head_dim_, head.score_scale(), k_t_);
    std::memset(dk_, 0, sizeof(Real) * panels(head_dim_) * kBlockPanel);
    if (!task.of_weights()) {
      pack(task.p.v, head_dim_v_, dv_);
      transpose_block(dv_, head_dim_v_, Real(1), v_t_);
      std::memset(dv_, 0, sizeof(Real) * panels(head_dim_v_) * kBlockPanel);
    }
    return is_finite(poison);
  }
  /// dK and dV of block n.
  void store_block(const KvHead& head, int n) const {
    const GradientTask& task = head.task;
    const int64_t k_begin = int64_t(n) * kBlockKeys;
    const int keys = smaller(kBlockKeys, int(head.mask.seqlen_k - k_begin));
    auto unpack = [&](const TensorView& view, int width, const Real* from) {
      if (!view.data) return;
      const int64_t at = view.offset(head.k_rows, head.head_k) + k_begin * view.row_stride;
      for (int j = 0; j < keys; ++j) {
        unpack_row(task.p.dtype, from + j * kPanel, kBlockPanel, width, view.data,
                   at + j * view.row_stride);
      }
    };
    unpack(task.dk, head_dim_, dk_);
    unpack(task.dv, head_dim_v_, dv_);
  }

  /// S = Q K^T, with the scale; dP = dO V^T.
  void multiply_scores(const Step& step) const { score(step, step.chunk.q, head_dim_, k_t_, p); }
  void multiply_gradients(const Step& step) const {
    score(step, step.chunk.dout, head_dim_v_, v_t_, ds);
  }
  /// P and dS are in place and are operands as they are.
  void round_weights(const Step&) const {}
  /// dV += P^T dO, dK += dS^T Q, dQ += dS K.
  void add_to_values(const Step& step, bool by_pairs) const {
    add_to_keys(step, by_pairs, p, ds, step.chunk.dout, head_dim_v_, dv_);
  }
  void add_to_keys(const Step& step, bool by_pairs) const {
    add_to_keys(step, by_pairs, ds, p, step.chunk.q, head_dim_, dk_);
  }
  void add_to_queries(const Step& step, bool by_pairs) const {
    const int rows = round_up(step.rows.end, kPanelRows) - step.rows.begin;
    const int64_t at = step.rows.begin * kScorePitch + step.keys.begin;
    const int keys = step.keys.end - step.keys.begin;
    for (int c = 0; c < head_dim_; c += kPanel) {
      const Real* panel = k_ + int64_t(c) * kBlockKeys + step.keys.begin * kPanel;
      Real* to = step.chunk.dq + int64_t(c) * kChunkQueries + step.rows.begin * kPanel;
      if (by_pairs) {
        add_product_of_kept_pairs(ds + at, p + at, kScorePitch, 1, rows, panel, keys, to);
        continue;
      }
      with_vectors(head_dim_ - c, [&]<int kVectors> {
        add_product<kVectors>(ds + at, kScorePitch, 1, rows, panel, keys, to);
      });
    }
  }

 private:
  /// scores = left right for the keys of the step.
  void score(const Step& step, const Real* left, int width, const Real* right, Real* scores) const {
    const int rows = round_up(step.rows.end, kPanelRows) - step.rows.begin;
    for (int j = step.keys.begin / kPanel * kPanel; j < step.keys.end; j += kPanel) {
      with_vectors(step.keys.end - j, [&]<int kVectors> {
        score_product<kVectors>(left + step.rows.begin * kPanel, kChunkPanel, rows, width,
                                right + int64_t(j) * width,
                                scores + step.rows.begin * kScorePitch + j);
      });
    }
  }
  /// sums += transposed(weights) right over the rows of the step, right a packed chunk.
  void add_to_keys(const Step& step, bool by_pairs, const Real* weights, const Real* others,
                   const Real* right, int width, Real* sums) const {
    const int first = step.keys.begin / 2 * 2, keys = round_up(step.keys.end, 2) - first;
    const int rows = step.rows.end - step.rows.begin;
    const int64_t at = step.rows.begin * kScorePitch + first;
    for (int c = 0; c < width; c += kPanel) {
      const Real* panel = right + int64_t(c) * kChunkQueries + step.rows.begin * kPanel;
      Real* to = sums + int64_t(c) * kBlockKeys + first * kPanel;
      if (by_pairs) {
        add_product_of_kept_pairs(weights + at, others + at, 1, kScorePitch, keys, panel, rows, to);
        continue;
      }
      with_vectors(width - c, [&]<int kVectors> {
        add_product<kVectors>(weights + at, 1, kScorePitch, keys, panel, rows, to);
      });
    }
  }

  int head_dim_, head_dim_v_;
  Real *k_, *k_t_, *v_t_;  ///< K packed; K^T times the score's scale; V^T
  Real *dk_, *dv_;         ///< packed sums
};

}  // namespace
}  // namespace flash::cpu
