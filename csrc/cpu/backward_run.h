// SPDX-License-Identifier: BSD-3-Clause
//
// The backward as a whole: which worker does what, and the sums over heads and sequences.
//
// Where kv heads are many, a worker takes one after the other, alone. Where they are few, or one is
// much of the work, or heads share elements of dbias, all workers share a kv head: they prepare its
// chunks, take its blocks of keys in ascending order, and store its dQ. The bits are the same.
#pragma once

#include "cpu/backward_block.h"

namespace flash::cpu {
namespace {

/// Calls f(worker) on all workers.
template <class F>
FLASH_INLINE void run_workers(const Launch& launch, F& f) {
  launch.workers->run([](void* context, int worker) { (*static_cast<F*>(context))(worker); }, &f);
}
/// Hands out the numbers 0, 1, ... to whoever asks.
class Counter {
 public:
  int64_t take() { return __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED); }

 private:
  int64_t next_ = 0;
};

class BackwardRun {
 public:
  BackwardRun(const GradientTask& task, int num_workers)
      : task_(task),
        bias_(BiasGradient::of(task)),
        variant_(task.of_weights() ? Variant::kGeneral : task.p.variant()),
        num_workers_(larger(num_workers, 1)) {
    for (int b = 0; b < task.p.batch; ++b) {
      const int q = queries(b).length, k = keys(b).length;
      longest_q_ = larger(longest_q_, q);
      longest_k_ = larger(longest_k_, k);
      pairs_ += int64_t(q) * k * task.p.num_heads;
    }
    const int64_t flops = 4 * pairs_ * (task.p.head_dim + task.p.head_dim_v);
    if (flops < kWorthAThread) num_workers_ = 1;
  }
  int64_t workspace_bytes() {
    Arena arena(nullptr);
    take_workspace(arena);
    return arena.used();
  }
  void run(const Launch& launch) {
    Arena arena(launch.workspace);
    take_workspace(arena);
    clear_sums();
    if (has_heads()) {
      run_heads_together(launch);
      run_heads_alone(launch);
    }
    finish();
  }

 private:
  /// Fewer are done before other threads have woken up.
  static constexpr int64_t kWorthAThread = 4'000'000;

  Sequence queries(int b) const { return Sequence::of(task_.p.q_layout, b); }
  Sequence keys(int b) const { return Sequence::of(task_.p.k_layout, b); }
  bool has_heads() const { return task_.p.batch > 0 && task_.p.num_heads > 0; }
  int64_t num_kv_heads() const { return int64_t(task_.p.batch) * task_.p.num_heads_k; }

  /// Whether all workers share each kv head of sequence b.
  bool together(int b) const {
    if (bias_.over_heads) return true;
    const int64_t pairs = int64_t(queries(b).length) * keys(b).length * task_.p.gqa_ratio();
    return num_workers_ > 1 && pairs * num_workers_ * 4 > pairs_;
  }

  struct WorkerScratch {
    BlockOperands block;
    PairRow* row;
  };
  /// Lays out the workspace: sums of the call, one block per worker, heads. Heads in work together
  /// and alone never exist at the same time.
  void take_workspace(Arena& arena) {
    const ForwardParams& p = task_.p;
    const int64_t heads = int64_t(p.batch) * p.num_heads;
    if (bias_.needs_sums()) bias_.sums = arena.take<Real>(bias_.size);
    slope_sums_ = arena.take<Real>(task_.dslopes ? heads : 0);
    sink_sums_ = arena.take<Real>(task_.dsink ? heads : 0);
    if (!has_heads()) return;
    worker_bytes_ = bytes_of([&](Arena& a) { take_worker(a); });
    head_bytes_ = bytes_of([&](Arena& a) { head_scratch(a, longest_q_, longest_k_); });
    workers_ = arena.take<char>(worker_bytes_ * num_workers_);
    bool any_alone = false;
    for (int b = 0; b < p.batch; ++b) any_alone |= !together(b);
    heads_ = arena.take<char>(head_bytes_ * (any_alone ? num_workers_ : 1));
  }
  template <class F>
  static int64_t bytes_of(F&& take) {
    Arena arena(nullptr);
    take(arena);
    return arena.used();
  }
  WorkerScratch take_worker(Arena& arena) const {
    return {BlockOperands(arena, task_), arena.take<PairRow>(variant_ == Variant::kGeneral)};
  }
  KeyBlock block_of(int worker) const {
    Arena arena(workers_ + worker * worker_bytes_);
    const WorkerScratch scratch = take_worker(arena);
    return {scratch.block, *scratch.row, true};
  }
  HeadScratch head_scratch(Arena& arena, int seqlen_q, int seqlen_k) const {
    return HeadScratch(arena, task_, chunk_sizes(task_), seqlen_q, seqlen_k);
  }
  KvHead head_of(int64_t index, int slot) const {
    const int b = int(index / task_.p.num_heads_k), hk = int(index % task_.p.num_heads_k);
    const Sequence q = queries(b), k = keys(b);
    Arena arena(heads_ + slot * head_bytes_);
    return {.task = task_,
            .bias = bias_,
            .variant = variant_,
            .batch = b,
            .head_k = hk,
            .q_rows = q,
            .k_rows = k,
            .mask = task_.p.mask_of(q, k),
            .scratch = head_scratch(arena, q.length, k.length)};
  }

  void run_heads_alone(const Launch& launch) {
    Counter counter;
    auto work = [&](int worker) {
      for (int64_t i = counter.take(); i < num_kv_heads(); i = counter.take()) {
        if (together(int(i / task_.p.num_heads_k))) continue;
        const KvHead head = head_of(i, worker);
        KeyBlock block = block_of(worker);
        for (int64_t c = 0; c < num_chunks(head); ++c) prepare_chunk(head, chunk(head, c));
        for (int n = 0; n < head.scratch.num_blocks; ++n) run_block(head, n, block);
        for (int64_t c = 0; c < num_chunks(head); ++c) store_chunk(head, chunk(head, c));
        finish_head(head);
      }
    };
    on_workers(launch, work);
  }
  void run_heads_together(const Launch& launch) {
    for (int64_t i = 0; i < num_kv_heads(); ++i) {
      if (!together(int(i / task_.p.num_heads_k))) continue;
      const KvHead head = head_of(i, 0);
      for_each(launch, num_chunks(head),
               [&](int, int64_t c) { prepare_chunk(head, chunk(head, c)); });
      for_each(launch, head.scratch.num_blocks, [&](int worker, int64_t n) {
        KeyBlock block = block_of(worker);
        run_block(head, int(n), block);
      });
      for_each(launch, num_chunks(head),
               [&](int, int64_t c) { store_chunk(head, chunk(head, c)); });
      finish_head(head);
    }
  }
  template <class F>
  void on_workers(const Launch& launch, F& work) const {
    auto in_scope = [&](int worker) {
      const ProductScope scope;
      work(worker);
    };
    if (num_workers_ == 1) {
      in_scope(0);
    } else {
      run_workers(launch, in_scope);
    }
  }
  template <class F>
  void for_each(const Launch& launch, int64_t count, F&& f) const {
    Counter counter;
    auto work = [&](int worker) {
      for (int64_t i = counter.take(); i < count; i = counter.take()) f(worker, i);
    };
    on_workers(launch, work);
  }

  int64_t num_chunks(const KvHead& head) const {
    return int64_t(task_.p.gqa_ratio()) * head.scratch.num_chunks;
  }
  Chunk chunk(const KvHead& head, int64_t index) const {
    const int per_head = head.scratch.num_chunks;
    return head.scratch.chunk(int(index / per_head), int(index % per_head), head.mask.seqlen_q);
  }
  /// The sums that are one number per head, and dbias where it sums over keys.
  void finish_head(const KvHead& head) const {
    const HeadScratch& scratch = head.scratch;
    for (int g = 0; g < task_.p.gqa_ratio(); ++g) {
      const int h = head.query_head(g);
      const int64_t index = int64_t(head.batch) * task_.p.num_heads + h;
      if (task_.dslopes) {
        Real sum = 0;
        for (int n = 0; n < scratch.num_blocks; ++n) {
          sum += scratch.slope_sums[int64_t(g) * scratch.num_blocks + n];
        }
        slope_sums_[index] = sum;
      }
      if (task_.dsink) sink_sums_[index] = sink_gradient(head, g);
      if (bias_.data && bias_.over_keys) {
        for (int c = 0; c < scratch.num_chunks; ++c) {
          const Chunk chunk = scratch.chunk(g, c, head.mask.seqlen_q);
          for (int i = 0; i < chunk.rows; ++i) {
            bias_.sums[bias_.row(head.batch, h, chunk.first_row + i)] += chunk.row_sums[i];
          }
        }
      }
    }
  }
  /// -sum_i exp(sink - lse_i) delta_i
  Real sink_gradient(const KvHead& head, int g) const {
    const Real sink = task_.p.features.sink.of<Real>(head.query_head(g));
    Real sum = 0;
    for (int c = 0; c < head.scratch.num_chunks; ++c) {
      const Chunk chunk = head.scratch.chunk(g, c, head.mask.seqlen_q);
      for (int i = 0; i < chunk.rows; ++i) {
        const Vector weight = exp2_of(splat((sink - chunk.lse[i]) * kLog2E));
        if (chunk.lse[i] != kInfinity) sum -= weight[0] * chunk.delta[i];
      }
    }
    return sum;
  }

  void clear_sums() {
    const int64_t heads = int64_t(task_.p.batch) * task_.p.num_heads;
    if (bias_.data && !bias_.clears_blocks)
      std::memset(bias_.data, 0, bias_.size * element_bytes(bias_.dtype));
    if (bias_.needs_sums()) std::memset(bias_.sums, 0, bias_.size * sizeof(Real));
    if (task_.dslopes) std::memset(slope_sums_, 0, heads * sizeof(Real));
    if (task_.dsink) std::memset(sink_sums_, 0, heads * sizeof(Real));
  }
  void finish() const {
    const ForwardParams& p = task_.p;
    if (bias_.needs_sums()) {
      constexpr int64_t kPiece = 1 << 16;
      for (int64_t i = 0; i < bias_.size; i += kPiece) {
        const int64_t left = bias_.size - i;
        write_row(bias_.dtype, bias_.data, i, int(left < kPiece ? left : kPiece), bias_.sums + i);
      }
    }
    if (task_.dslopes && task_.slopes_per_batch) {
      const int64_t heads = int64_t(p.batch) * p.num_heads;
      std::memcpy(task_.dslopes, slope_sums_, heads * sizeof(Real));
    } else if (task_.dslopes) {
      sum_over_batch(slope_sums_, static_cast<Real*>(task_.dslopes));
    }
    if (task_.dsink) sum_over_batch(sink_sums_, static_cast<Real*>(task_.dsink));
  }
  void sum_over_batch(const Real* from, Real* to) const {
    for (int h = 0; h < task_.p.num_heads; ++h) {
      to[h] = 0;
      for (int b = 0; b < task_.p.batch; ++b) to[h] += from[int64_t(b) * task_.p.num_heads + h];
    }
  }

  const GradientTask& task_;
  BiasGradient bias_;
  Variant variant_;
  int num_workers_, longest_q_ = 0, longest_k_ = 0;
  int64_t pairs_ = 0, worker_bytes_ = 0, head_bytes_ = 0;
  char *workers_ = nullptr, *heads_ = nullptr;
  Real *slope_sums_ = nullptr, *sink_sums_ = nullptr;
};

}  // namespace
}  // namespace flash::cpu
