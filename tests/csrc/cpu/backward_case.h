// SPDX-License-Identifier: BSD-3-Clause
// A random call of the CPU backward: out and lse are the formula's, rounded (`saved`); gradients
// and workspace are full of NaN beforehand.
#pragma once

#include "cpu/forward_case.h"

namespace flash {

/// The kernels that a program tests.
struct TestedBackward {
  const char* name;
  int64_t (*workspace_bytes)(const BackwardParams&, int num_workers);
  void (*run)(const BackwardParams&, const Launch&);
  bool rounds_operands;  ///< P and dS of bf16, for products in pairs
};
inline TestedBackward tested_backward;

class BackwardCall {
 public:
  BackwardParams p{};
  reference::Result saved;

  BackwardCall(const ForwardCase& c, bool with_dlse, uint64_t seed)
      : forward_(c, seed), generator_(seed + 1) {
    static_cast<ForwardParams&>(p) = forward_.p;
    saved = reference::forward(p);
    const bool packed = p.q_layout.packed();
    const int64_t q_rows = packed ? p.q_layout.total : c.sq, q_batch = packed ? 1 : c.batch;
    const int64_t k_rows = packed ? p.k_layout.total : c.sk;
    for_each_row(p.q_layout, c.heads, [&](int b, int h, int i, const Sequence& s) {
      const int64_t row = (int64_t(b) * c.heads + h) * c.sq + i;
      auto round = [](DType dtype, void* data, int64_t at, double& value) {
        reference::store(dtype, data, at, value);
        value = reference::load(dtype, data, at);
      };
      round(accumulation(), p.lse.data, p.lse.offset(s, h) + i, saved.lse[row]);
      const int64_t at = p.out.offset(s, h) + i * p.out.row_stride;
      for (int d = 0; d < c.dv; ++d) round(c.dtype, p.out.data, at + d, saved.out[row * c.dv + d]);
    });
    p.dout = tensor(q_batch, c.heads, q_rows, c.dv, 1);
    if (with_dlse) {
      p.dlse = {numbers(accumulation(), q_batch * c.heads * q_rows, 1),
                packed ? 0 : c.heads * q_rows, q_rows};
    }
    p.dq = tensor(q_batch, c.heads, q_rows, c.d, NAN);
    p.dk = tensor(packed ? 1 : c.batch, c.heads_k, k_rows, c.d, NAN);
    p.dv = tensor(packed ? 1 : c.batch, c.heads_k, k_rows, c.dv, NAN);
    const int full[4] = {c.batch, c.heads, c.sq, c.sk};
    for (int d = 0; d < 4; ++d) {
      p.bias_shape[d] = !c.bias ? 0 : c.broadcast >> d & 1 ? 1 : full[d];
    }
    if (c.bias) p.dbias = numbers(bias_dtype(), bias_size(), NAN);
    p.slopes_per_batch = true;
    if (c.alibi) p.dslopes = numbers(accumulation(), int64_t(c.batch) * c.heads, NAN);
    if (c.sink) p.dsink = numbers(accumulation(), c.heads, NAN);
  }

  DType accumulation() const { return reference::accumulation(p.dtype); }
  DType bias_dtype() const {
    return p.features.score_mod.bias_is_float32 ? DType::kFloat32 : p.dtype;
  }
  int64_t bias_size() const {
    return int64_t(p.bias_shape[0]) * p.bias_shape[1] * p.bias_shape[2] * p.bias_shape[3];
  }
  ForwardCall& forward() { return forward_; }
  void set(const TensorView& t, const SequenceLayout& layout, int b, int h, int row, int column,
           double value) {
    forward_.set(t, layout, b, h, row, column, value);
  }

  /// Runs what is tested; a gradient whose pointer is null comes back as zeros.
  reference::Gradients run(int num_threads) {
    ThreadWorkers workers(num_threads);
    poison();
    const int64_t bytes = tested_backward.workspace_bytes(p, num_threads);
    std::unique_ptr<char[], void (*)(void*)> workspace(
        static_cast<char*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256 + 256)), std::free);
    std::memset(workspace.get(), 0xff, bytes + 256);
    tested_backward.run(p, {workspace.get(), nullptr, &workers});
    for (int i = 0; i < 256; ++i) CHECK(workspace[bytes + i] == char(0xff));  // wrote beyond it
    reference::Gradients g;
    g.dq = rows_of(p.dq, p.q_layout, p.num_heads, p.head_dim);
    g.dk = rows_of(p.dk, p.k_layout, p.num_heads_k, p.head_dim);
    g.dv = rows_of(p.dv, p.k_layout, p.num_heads_k, p.head_dim_v);
    g.dbias = values(p.dbias, bias_dtype(), bias_size());
    g.dslopes =
        values(p.dslopes, accumulation(), int64_t(p.slopes_per_batch ? p.batch : 1) * p.num_heads);
    g.dsink = values(p.dsink, accumulation(), p.num_heads);
    return g;
  }

  /// All bits one: a NaN in every dtype.
  void poison() {
    for (Memory& memory : outputs_) std::memset(memory.bytes.get(), 0xff, memory.size);
  }
  /// The rows inside sequences; all others, and the gaps, must be untouched.
  std::vector<double> rows_of(const TensorView& t, const SequenceLayout& layout, int heads,
                              int width) {
    std::vector<double> result(int64_t(p.batch) * heads * layout.max * width, 0.0);
    if (!t.data) return result;
    const int64_t bytes = element_bytes(p.dtype);
    for_each_row(layout, heads, [&](int b, int h, int i, const Sequence& s) {
      const int64_t row = (int64_t(b) * heads + h) * layout.max + i;
      const int64_t at = t.offset(s, h) + i * t.row_stride;
      for (int d = 0; d < width; ++d) {
        result[row * width + d] = reference::load(p.dtype, t.data, at + d);
      }
      std::memset(static_cast<char*>(t.data) + at * bytes, 0xff, width * bytes);
    });
    for (const Memory& memory : outputs_) {
      if (memory.bytes.get() != t.data) continue;
      for (int64_t i = 0; i < memory.size; ++i) CHECK(memory.bytes[i] == char(0xff));
    }
    return result;
  }

 private:
  ForwardCall forward_;
  std::mt19937_64 generator_;
  struct Memory {
    std::shared_ptr<char[]> bytes;
    int64_t size;
  };
  std::vector<Memory> outputs_, inputs_;

  template <class F>
  void for_each_row(const SequenceLayout& layout, int heads, F&& f) const {
    for (int b = 0; b < p.batch; ++b) {
      const Sequence s = Sequence::of(layout, b);
      for (int h = 0; h < heads; ++h) {
        for (int i = 0; i < s.length; ++i) f(b, h, i, s);
      }
    }
  }
  /// Random normal numbers times `magnitude`; NaN: an output.
  void* numbers(DType dtype, int64_t count, double magnitude) {
    const int64_t size = count * element_bytes(dtype) + 1;
    auto& list = std::isnan(magnitude) ? outputs_ : inputs_;
    list.push_back({std::make_shared<char[]>(size), size});
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < count; ++i) {
      reference::store(dtype, list.back().bytes.get(), i, magnitude * normal(generator_));
    }
    return list.back().bytes.get();
  }
  TensorView tensor(int64_t batch, int heads, int64_t rows, int width, double magnitude) {
    const int64_t pitch = width + 5;
    return {numbers(p.dtype, batch * heads * rows * pitch, magnitude), heads * rows * pitch, pitch,
            heads * pitch};
  }
  std::vector<double> values(const void* data, DType dtype, int64_t count) const {
    std::vector<double> result(count, 0.0);
    for (int64_t i = 0; data && i < count; ++i) result[i] = reference::load(dtype, data, i);
    return result;
  }
};

}  // namespace flash
