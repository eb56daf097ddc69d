// SPDX-License-Identifier: BSD-3-Clause
// A random call of a CPU backend function: tensors with gaps full of NaN between the rows, outputs
// and workspace full of NaN beforehand.
#pragma once

#include <memory>
#include <random>
#include <vector>

#include "attention/params.h"
#include "check.h"
#include "cpu/backend.h"
#include "reference.h"
#include "threads.h"

namespace flash {

constexpr int kUnbounded = IntervalMask::kUnbounded;
inline uint64_t seed_of_run;

/// Unit roundoff: of the result's dtype, of the accumulation's.
inline double roundoff(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return 0x1p-8;
    case DType::kFloat16:
      return 0x1p-11;
    case DType::kFloat32:
      return 0x1p-24;
    case DType::kFloat64:
      return 0x1p-53;
  }
  return 0;
}

/// Half the distance of the smallest numbers: what rounding is off by near 0.
inline double half_spacing_at_0(DType dtype) {
  const double smallest_normal = dtype == DType::kFloat64   ? 0x1p-1022
                                 : dtype == DType::kFloat16 ? 0x1p-14
                                                            : 0x1p-126;
  return roundoff(dtype) * smallest_normal;
}

inline bool same_bits(const std::vector<double>& a, const std::vector<double>& b) {
  if (a.size() != b.size()) return false;
  return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

enum class Order { kHeadsFirst, kRowsFirst };  ///< (b, h, rows, d) or (b, rows, h, d)

struct ForwardCase {
  DType dtype = DType::kFloat32;
  int batch = 1, heads = 1, heads_k = 1, sq = 1, sk = 1, d = 8, dv = 8;
  double scale = 0.125, magnitude = 1;
  MaskSpec mask = {};
  Order order = Order::kHeadsFirst;
  bool packed = false, seqused = false;
  double softcap = 0;
  bool bias = false, bias_is_float32 = false, bool_mask = false;
  int broadcast = 0;  ///< bits: dims of bias and mask with size 1
  bool alibi = false, sink = false;
  double dropout_p = 0;
};

struct Choice {
  std::mt19937_64& generator;
  template <class T>
  T operator()(std::initializer_list<T> values) {
    return values.begin()[generator() % values.size()];
  }
  bool one_in(int n) { return generator() % n == 0; }
};

/// All of a random case but its sizes.
inline void choose_features(Choice& choose, ForwardCase& c) {
  c.scale = choose({0.125, 0.3, -0.2, 0.0});
  c.mask = {choose({false, true}), choose({kUnbounded, kUnbounded, 0, 10, 70}),
            choose({kUnbounded, 0, 0, 3, 50}), choose({0, 0, 0, 20})};
  c.order = choose({Order::kHeadsFirst, Order::kRowsFirst});
  c.packed = choose.one_in(3);
  c.seqused = choose.one_in(4);
  if (choose.one_in(2)) return;
  if (choose.one_in(3)) c.softcap = choose({1.5, 30.0});
  c.bias = choose.one_in(2);
  c.bias_is_float32 = choose.one_in(2);
  c.bool_mask = choose.one_in(3);
  c.broadcast = int(choose.generator() % 16);
  c.alibi = choose.one_in(3);
  c.sink = choose.one_in(3);
  if (choose.one_in(2)) c.dropout_p = choose({0.1, 0.5, 0.9, 1.0});
}

/// The kernels that a program tests.
struct Tested {
  const char* name;
  int64_t (*workspace_bytes)(const ForwardParams&, int num_workers);
  void (*run)(const ForwardParams&, const Launch&);
  bool rounds_weights;  ///< of bf16, for the product with V
};
inline Tested tested;

class ForwardCall {
 public:
  ForwardParams p{};

  ForwardCall(const ForwardCase& c, uint64_t seed) : generator_(seed) {
    p.dtype = c.dtype;
    p.batch = c.batch, p.num_heads = c.heads, p.num_heads_k = c.heads_k;
    p.head_dim = c.d, p.head_dim_v = c.dv;
    p.softmax_scale = c.scale;
    p.mask = c.mask;
    p.q_layout = layout(c, c.sq);
    p.k_layout = layout(c, c.sk);
    p.q = tensor(c, p.q_layout, c.heads, c.d, c.magnitude);
    p.k = tensor(c, p.k_layout, c.heads_k, c.d, c.magnitude);
    p.v = tensor(c, p.k_layout, c.heads_k, c.dv, 1);
    p.out = tensor(c, p.q_layout, c.heads, c.dv, NAN);
    const int64_t rows = c.packed ? p.q_layout.total : c.sq;
    p.lse = {numbers(reference::accumulation(c.dtype), int64_t(c.batch) * c.heads * rows, NAN),
             c.packed ? 0 : c.heads * rows, rows};
    features(c);
  }

  /// Runs what is tested. Returns out and lse in the order of reference::Result.
  reference::Result run(int num_threads) {
    ThreadWorkers workers(num_threads);
    const int64_t bytes = tested.workspace_bytes(p, num_threads);
    std::unique_ptr<char[], void (*)(void*)> workspace(
        static_cast<char*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256 + 256)), std::free);
    std::memset(workspace.get(), 0xff, bytes + 256);
    tested.run(p, {workspace.get(), nullptr, &workers});
    for (int i = 0; i < 256; ++i) CHECK(workspace[bytes + i] == char(0xff));  // wrote beyond it

    reference::Result r{
        std::vector<double>(int64_t(p.batch) * p.num_heads * p.q_layout.max * p.head_dim_v, 0.0),
        std::vector<double>(int64_t(p.batch) * p.num_heads * p.q_layout.max, -INFINITY)};
    for (int b = 0; b < p.batch; ++b) {
      for (int h = 0; h < p.num_heads; ++h) {
        const Sequence s = Sequence::of(p.q_layout, b);
        for (int i = 0; i < s.length; ++i) {
          const int64_t row = (int64_t(b) * p.num_heads + h) * p.q_layout.max + i;
          r.lse[row] =
              reference::load(reference::accumulation(p.dtype), p.lse.data, p.lse.offset(s, h) + i);
          for (int d = 0; d < p.head_dim_v; ++d) {
            r.out[row * p.head_dim_v + d] =
                reference::load(p.dtype, p.out.data, p.out.offset(s, h) + i * p.out.row_stride + d);
          }
        }
      }
    }
    return r;
  }

  /// Element (row, column) of head h of sequence b.
  void set(const TensorView& t, const SequenceLayout& layout, int b, int h, int row, int column,
           double value) {
    const Sequence s = Sequence::of(layout, b);
    reference::store(p.dtype, t.data, t.offset(s, h) + row * t.row_stride + column, value);
  }

 private:
  std::mt19937_64 generator_;
  std::vector<std::shared_ptr<char[]>> memory_;

  int below(int n) { return int(generator_() % uint64_t(n)); }
  /// Random normal numbers times `magnitude`; NaN: all NaN.
  void* numbers(DType dtype, int64_t count, double magnitude) {
    memory_.push_back(std::make_shared<char[]>(count * element_bytes(dtype) + 1));
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < count; ++i) {
      reference::store(dtype, memory_.back().get(), i, magnitude * normal(generator_));
    }
    return memory_.back().get();
  }
  SequenceLayout layout(const ForwardCase& c, int length) {
    SequenceLayout layout{length, 0, nullptr, nullptr};
    auto integers = [&](int count) {
      memory_.push_back(std::make_shared<char[]>(count * sizeof(int32_t)));
      return reinterpret_cast<int32_t*>(memory_.back().get());
    };
    if (c.packed) {
      int32_t* cu = integers(c.batch + 1);
      cu[0] = 2;  // two rows that no sequence owns
      for (int b = 0; b < c.batch; ++b) cu[b + 1] = cu[b] + (b ? below(length + 1) : length);
      layout.cu_seqlens = cu;
      layout.total = cu[c.batch] + 3;
    }
    if (c.seqused) {
      int32_t* used = integers(c.batch);
      for (int b = 0; b < c.batch; ++b) used[b] = below(length + 1);
      layout.seqused = used;
    }
    return layout;
  }
  TensorView tensor(const ForwardCase& c, const SequenceLayout& layout, int heads, int width,
                    double magnitude) {
    const int64_t rows = c.packed ? layout.total : layout.max, batch = c.packed ? 1 : c.batch;
    const int64_t pitch = width + 3;
    TensorView t{numbers(c.dtype, batch * heads * rows * pitch, NAN), heads * rows * pitch,
                 rows * pitch, pitch};
    if (c.order == Order::kRowsFirst) t.head_stride = pitch, t.row_stride = heads * pitch;
    std::normal_distribution<double> normal;
    for (int64_t b = 0; b < batch; ++b) {
      for (int h = 0; h < heads; ++h) {
        for (int64_t i = 0; i < rows; ++i) {
          for (int d = 0; d < width; ++d) {
            reference::store(c.dtype, t.data,
                             b * t.batch_stride + h * t.head_stride + i * t.row_stride + d,
                             magnitude * normal(generator_));
          }
        }
      }
    }
    return t;
  }
  PairView pairs(const ForwardCase& c, const void* data) {
    const int64_t sizes[] = {c.broadcast & 1 ? 1 : c.batch, c.broadcast & 2 ? 1 : c.heads,
                             c.broadcast & 4 ? 1 : c.sq, c.broadcast & 8 ? 1 : c.sk};
    PairView view{data, sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1};
    int64_t* strides[] = {&view.batch_stride, &view.head_stride, &view.q_stride, &view.k_stride};
    for (int dim = 0; dim < 4; ++dim) {
      if (sizes[dim] == 1) *strides[dim] = 0;
    }
    return view;
  }
  void features(const ForwardCase& c) {
    const DType acc = reference::accumulation(c.dtype);
    const int64_t all = int64_t(c.batch) * c.heads * c.sq * c.sk;
    ScoreMod& mod = p.features.score_mod;
    mod.softcap = c.softcap;
    if (c.bias) {
      const DType dtype = c.bias_is_float32 ? DType::kFloat32 : c.dtype;
      void* data = numbers(dtype, all, 2);
      for (int64_t i = 0; i < all; ++i) {
        if (below(20) == 0) reference::store(dtype, data, i, -INFINITY);
      }
      mod.bias = pairs(c, data);
      mod.bias_is_float32 = c.bias_is_float32;
    }
    if (c.bool_mask) {
      memory_.push_back(std::make_shared<char[]>(all + 1));
      for (int64_t i = 0; i < all; ++i) memory_.back()[i] = below(4) ? char(1 + below(200)) : 0;
      mod.mask = pairs(c, memory_.back().get());
    }
    if (c.alibi) {
      mod.alibi_slopes = numbers(acc, int64_t(c.batch) * c.heads, 0.3);
      mod.slopes_batch_stride = c.heads;
      mod.slopes_head_stride = 1;
    }
    if (c.sink) p.features.sink = {numbers(acc, c.heads, 2), 1};
    if (c.dropout_p > 0) {
      memory_.push_back(std::make_shared<char[]>(2 * sizeof(int64_t)));
      int64_t* state = reinterpret_cast<int64_t*>(memory_.back().get());
      state[0] = int64_t(generator_()), state[1] = int64_t(generator_() % 1000);
      p.features.dropout = {state, uint32_t(std::lround((1 - c.dropout_p) * 65536)),
                            c.dropout_p == 1 ? 0.f : float(1 / (1 - c.dropout_p))};
    }
  }
};

}  // namespace flash
