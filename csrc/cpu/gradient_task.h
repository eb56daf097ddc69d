// SPDX-License-Identifier: BSD-3-Clause
//
// What the backward is asked, where its scratch lies, and the gradient of the bias.
#pragma once

#include "attention/backend.h"
#include "cpu/rows.h"
#include "cpu/tile.h"

namespace flash::cpu {
namespace {

/// Queries that one step takes together: a multiple of the rows of tiles and of the 16 of
/// dropout.h.
constexpr int kChunkQueries = 96;

/// The gradients of out and lse, or of the attention weights: either way P is recomputed and
///   dS = P o (dP - delta)
/// with dP = dO V^T and delta = rowsum(dO o O) - dLSE, or dP = dW and delta = 0. Null tensors are
/// not given, or not wanted.
struct GradientTask {
  const ForwardParams& p;
  TensorView dout;                 ///< cotangent of out
  RowView dlse;                    ///< cotangent of lse
  const void* dweights = nullptr;  ///< or the cotangent of the weights, contiguous
  bool average = false;            ///< which are then (b, sq, sk) means over the heads
  TensorView dq, dk, dv;
  RowView lse_gradient;  ///< of the weights: -rowsum(dS)
  void* dbias = nullptr;
  const int* bias_shape = nullptr;
  void* dslopes = nullptr;
  bool slopes_per_batch = false;
  void* dsink = nullptr;

  bool of_weights() const { return dweights != nullptr; }
  bool wants_ds() const { return dq.data || dk.data || lse_gradient.data || dbias || dslopes; }
};

/// dbias in the bias's own shape: sums of Reals over whatever broadcasts, rounded once; where
/// nothing broadcasts, each element is one pair's and is written at once.
struct BiasGradient {
  DType dtype;
  void* data = nullptr;  ///< null: not wanted
  Real* sums = nullptr;  ///< null: nothing broadcasts
  int64_t stride[4] = {}, size = 0;
  bool is_shared = false;      ///< some element belongs to more than one pair
  bool clears_blocks = false;  ///< whoever has a block of pairs clears what it does not write
  bool over_heads = false;     ///< heads or sequences share elements: one kv head after the other
  bool over_keys = false;      ///< an element is a sum along a row of dS

  static BiasGradient of(const GradientTask& task) {
    BiasGradient g{.dtype =
                       task.p.features.score_mod.bias_is_float32 ? DType::kFloat32 : task.p.dtype};
    if (!task.dbias) return g;
    const int full[4] = {task.p.batch, task.p.num_heads, task.p.q_layout.max, task.p.k_layout.max};
    bool shared[4];
    g.data = task.dbias;
    g.size = 1;
    for (int d = 3; d >= 0; --d) {
      shared[d] = task.bias_shape[d] == 1 && full[d] != 1;
      g.stride[d] = task.bias_shape[d] == 1 ? 0 : g.size;
      g.size *= task.bias_shape[d];
    }
    g.over_heads = shared[0] || shared[1];
    g.over_keys = shared[3];
    g.is_shared = shared[0] || shared[1] || shared[2] || shared[3];
    if (g.is_shared && element_bytes(g.dtype) == int(sizeof(Real))) {
      g.sums = static_cast<Real*>(g.data);
    }
    // Pairs beyond the length of a sequence are nobody's.
    const SequenceLayout &q = task.p.q_layout, &k = task.p.k_layout;
    const bool is_ragged = q.ragged() || k.ragged();
    g.clears_blocks = !g.is_shared && !is_ragged;
    return g;
  }
  /// Whether the tensor cannot hold the sums itself.
  bool needs_sums() const { return is_shared && element_bytes(dtype) != int(sizeof(Real)); }
  int64_t row(int batch, int head, int q) const {
    return batch * stride[0] + head * stride[1] + q * stride[2];
  }
};

/// Hands out pieces of a workspace, each on a cache line of its own; from a null base it only
/// counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    char* taken = base_ ? base_ + used_ : nullptr;
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(taken);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace flash::cpu
