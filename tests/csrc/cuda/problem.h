// SPDX-License-Identifier: BSD-3-Clause
// A random problem for a CUDA backend: its tensors on the host, where the fp64 formula reads them,
// and a mirror on the device. Gaps between rows hold NaN, outputs are full of NaN beforehand.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "attention/backend.h"
#include "reference.h"

#define CUDA_OK(call)                                                                           \
  do {                                                                                          \
    const cudaError_t status = (call);                                                          \
    if (status != cudaSuccess) {                                                                \
      std::fprintf(stderr, "%s: %s at line %d\n", #call, cudaGetErrorString(status), __LINE__); \
      std::exit(1);                                                                             \
    }                                                                                           \
  } while (0)

namespace flash {

struct Case {
  std::string name;
  DType dtype = DType::kFloat32;
  int batch = 2, heads = 4, heads_k = 2, sq = 77, sk = 93, d = 32, dv = 32;
  double scale = 0.2;
  MaskSpec mask = {};
  bool rows_first = false;  ///< (b, rows, h, d) instead of (b, h, rows, d)
  int gap = 0;              ///< elements between rows
  bool packed = false, seqused = false;
  double softcap = 0;
  bool bias = false, bias_is_float32 = false, bool_mask = false;
  int broadcast = 0;  ///< bits: dims of bias and mask of size 1
  bool alibi = false, slopes_per_batch = false, sink = false, dlse = false;
  double dropout_p = 0;
  bool masked_keys_are_nan = false;  ///< with a bool mask that broadcasts over heads and queries
  int unwanted = 0;                  ///< bits: dq, dk, dv are null
};

/// One piece of host memory and its copy on the device, at equal offsets.
class MirroredMemory {
 public:
  explicit MirroredMemory(size_t capacity) : capacity_(capacity) {
    CUDA_OK(cudaMallocHost(&host_, capacity));
    CUDA_OK(cudaMalloc(&device_, capacity));
  }
  void reset() { used_ = 0; }
  void* allocate(size_t bytes) {
    void* result = host_ + used_;
    used_ += (bytes + 255) / 256 * 256;
    if (used_ > capacity_) std::fprintf(stderr, "test memory is too small\n"), std::exit(1);
    return result;
  }
  template <class T>
  T* on_device(T* host) const {
    if (!host) return nullptr;
    return reinterpret_cast<T*>(device_ + (reinterpret_cast<const char*>(host) - host_));
  }
  std::vector<char> contents() const { return {host_, host_ + used_}; }
  void upload() { CUDA_OK(cudaMemcpy(device_, host_, used_, cudaMemcpyHostToDevice)); }
  void download() { CUDA_OK(cudaMemcpy(host_, device_, used_, cudaMemcpyDeviceToHost)); }

 private:
  char *host_ = nullptr, *device_ = nullptr;
  size_t capacity_, used_ = 0;
};

/// The tensors of a case, host pointers. Backward and weights have their own parameters.
class Problem {
 public:
  BackwardParams p{};
  WeightsBackwardParams w{};  ///< dense cases only

  Problem(const Case& c, uint64_t seed, MirroredMemory& memory)
      : c_(c), memory_(memory), generator_(seed) {
    p.dtype = c.dtype;
    p.batch = c.batch, p.num_heads = c.heads, p.num_heads_k = c.heads_k;
    p.head_dim = c.d, p.head_dim_v = c.dv;
    p.softmax_scale = c.scale;
    p.mask = c.mask;
    p.q_layout = layout(c.sq);
    p.k_layout = layout(c.sk);
    p.q = tensor(p.q_layout, c.heads, c.d, 1);
    p.k = tensor(p.k_layout, c.heads_k, c.d, 1);
    p.v = tensor(p.k_layout, c.heads_k, c.dv, 1);
    p.out = tensor(p.q_layout, c.heads, c.dv, NAN);
    p.lse = row_values(NAN);
    p.dout = tensor(p.q_layout, c.heads, c.dv, 1);
    if (c.dlse) p.dlse = row_values(1);
    p.dq = tensor(p.q_layout, c.heads, c.d, NAN);
    p.dk = tensor(p.k_layout, c.heads_k, c.d, NAN);
    p.dv = tensor(p.k_layout, c.heads_k, c.dv, NAN);
    features();
    hide_unowned(p.q, p.q_layout, c.heads, c.d);
    hide_unowned(p.dout, p.q_layout, c.heads, c.dv);
    hide_unowned(p.k, p.k_layout, c.heads_k, c.d);
    hide_unowned(p.v, p.k_layout, c.heads_k, c.dv);
    if (c.masked_keys_are_nan) hide_masked_keys();
    if (c.unwanted & 1) p.dq.data = nullptr;
    if (c.unwanted & 2) p.dk.data = nullptr;
    if (c.unwanted & 4) p.dv.data = nullptr;
    if (!c.packed && !c.seqused) weights();
  }

  DType accumulation() const { return reference::accumulation(c_.dtype); }

  BackwardParams device_params() const {
    BackwardParams q = p;
    move(q);
    for (TensorView* t : {&q.dout, &q.dq, &q.dk, &q.dv}) t->data = memory_.on_device(t->data);
    q.dlse.data = memory_.on_device(q.dlse.data);
    q.dbias = memory_.on_device(q.dbias);
    q.dslopes = memory_.on_device(q.dslopes);
    q.dsink = memory_.on_device(q.dsink);
    return q;
  }
  WeightsBackwardParams device_weights() const {
    WeightsBackwardParams q = w;
    move(q);
    q.weights = memory_.on_device(q.weights);
    q.dweights = memory_.on_device(q.dweights);
    q.dq.data = memory_.on_device(q.dq.data);
    q.dk.data = memory_.on_device(q.dk.data);
    q.dlse.data = memory_.on_device(q.dlse.data);
    q.dbias = memory_.on_device(q.dbias);
    return q;
  }

 private:
  const Case& c_;
  MirroredMemory& memory_;
  std::mt19937_64 generator_;

  int below(int n) { return int(generator_() % uint64_t(n)); }

  void move(ForwardParams& q) const {
    for (TensorView* t : {&q.q, &q.k, &q.v, &q.out}) t->data = memory_.on_device(t->data);
    q.lse.data = memory_.on_device(q.lse.data);
    for (SequenceLayout* l : {&q.q_layout, &q.k_layout}) {
      l->cu_seqlens = memory_.on_device(l->cu_seqlens);
      l->seqused = memory_.on_device(l->seqused);
    }
    ScoreMod& mod = q.features.score_mod;
    mod.bias.data = memory_.on_device(mod.bias.data);
    mod.mask.data = memory_.on_device(mod.mask.data);
    mod.alibi_slopes = memory_.on_device(mod.alibi_slopes);
    q.features.sink.logits = memory_.on_device(q.features.sink.logits);
    q.features.dropout.rng_state = memory_.on_device(q.features.dropout.rng_state);
  }

  /// Normal numbers times `magnitude`; NaN: all NaN.
  void* numbers(DType dtype, int64_t count, double magnitude) {
    void* data = memory_.allocate(count * element_bytes(dtype));
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < count; ++i)
      reference::store(dtype, data, i, magnitude * normal(generator_));
    return data;
  }
  SequenceLayout layout(int length) {
    SequenceLayout layout{length, 0, nullptr, nullptr};
    const auto integers = [&](int count) {
      return static_cast<int32_t*>(memory_.allocate(count * sizeof(int32_t)));
    };
    if (c_.packed) {
      int32_t* cu = integers(c_.batch + 1);
      cu[0] = 2;  // two rows that no sequence owns
      for (int b = 0; b < c_.batch; ++b) cu[b + 1] = cu[b] + (b ? below(length + 1) : length);
      layout.cu_seqlens = cu;
      layout.total = cu[c_.batch] + 3;
    }
    if (c_.seqused) {
      int32_t* used = integers(c_.batch);
      for (int b = 0; b < c_.batch; ++b) used[b] = below(length + 1);
      layout.seqused = used;
    }
    return layout;
  }
  TensorView tensor(const SequenceLayout& layout, int heads, int width, double magnitude) {
    const int64_t rows = c_.packed ? layout.total : layout.max, batch = c_.packed ? 1 : c_.batch;
    const int64_t pitch = width + c_.gap;
    TensorView t{numbers(c_.dtype, batch * heads * rows * pitch, NAN), heads * rows * pitch,
                 rows * pitch, pitch};
    if (c_.rows_first) t.head_stride = pitch, t.row_stride = heads * pitch;
    std::normal_distribution<double> normal;
    for (int64_t b = 0; b < batch; ++b)
      for (int h = 0; h < heads; ++h)
        for (int64_t i = 0; i < rows; ++i)
          for (int d = 0; d < width; ++d)
            reference::store(c_.dtype, t.data,
                             b * t.batch_stride + h * t.head_stride + i * t.row_stride + d,
                             magnitude * normal(generator_));
    return t;
  }
  void hide_row(const TensorView& t, int64_t at, int width) {
    for (int d = 0; d < width; ++d) reference::store(c_.dtype, t.data, at + d, NAN);
  }
  /// NaN in the rows of an input that no sequence owns.
  void hide_unowned(const TensorView& t, const SequenceLayout& layout, int heads, int width) {
    const int64_t rows = layout.packed() ? layout.total : layout.max;
    for (int tensor = 0; tensor < (layout.packed() ? 1 : c_.batch); ++tensor)
      for (int64_t row = 0; row < rows; ++row) {
        bool owned = false;
        for (int b = 0; b < c_.batch; ++b) {
          const Sequence s = Sequence::of(layout, b);
          owned |= s.batch_index == tensor && row >= s.first_row && row < s.first_row + s.length;
        }
        for (int h = 0; h < heads && !owned; ++h)
          hide_row(t, tensor * t.batch_stride + h * t.head_stride + row * t.row_stride, width);
      }
  }
  void hide_masked_keys() {
    for (int b = 0; b < c_.batch; ++b)
      for (int h = 0; h < c_.heads_k; ++h)
        for (int k = 0; k < c_.sk; ++k) {
          if (p.features.score_mod.mask_keeps({b, 0, 0, k})) continue;
          const Sequence s = Sequence::of(p.k_layout, b);
          hide_row(p.k, p.k.offset(s, h) + k * p.k.row_stride, c_.d);
          hide_row(p.v, p.v.offset(s, h) + k * p.v.row_stride, c_.dv);
        }
  }
  RowView row_values(double magnitude) {
    const int64_t rows = c_.packed ? p.q_layout.total : c_.sq, batch = c_.packed ? 1 : c_.batch;
    return {numbers(accumulation(), batch * c_.heads * rows, magnitude),
            c_.packed ? 0 : c_.heads * rows, rows};
  }
  PairView pairs(const void* data, int (&shape)[4]) {
    const int sizes[] = {c_.batch, c_.heads, c_.sq, c_.sk};
    for (int dim = 0; dim < 4; ++dim) shape[dim] = c_.broadcast >> dim & 1 ? 1 : sizes[dim];
    PairView view{data, int64_t(shape[1]) * shape[2] * shape[3], int64_t(shape[2]) * shape[3],
                  shape[3], 1};
    int64_t* strides[] = {&view.batch_stride, &view.head_stride, &view.q_stride, &view.k_stride};
    for (int dim = 0; dim < 4; ++dim)
      if (shape[dim] == 1) *strides[dim] = 0;
    return view;
  }
  void features() {
    const int64_t all = int64_t(c_.batch) * c_.heads * c_.sq * c_.sk;
    ScoreMod& mod = p.features.score_mod;
    mod.softcap = c_.softcap;
    int shape[4];
    if (c_.bias) {
      const DType dtype = c_.bias_is_float32 ? DType::kFloat32 : c_.dtype;
      void* data = numbers(dtype, all, 2);
      for (int64_t i = 0; i < all; ++i)
        if (below(20) == 0) reference::store(dtype, data, i, -INFINITY);
      mod.bias = pairs(data, p.bias_shape);
      mod.bias_is_float32 = c_.bias_is_float32;
      p.dbias = numbers(dtype, all, NAN);
    }
    if (c_.bool_mask) {
      char* data = static_cast<char*>(memory_.allocate(all));
      for (int64_t i = 0; i < all; ++i) data[i] = below(4) ? char(1 + below(200)) : 0;
      mod.mask = pairs(data, shape);
    }
    if (c_.alibi) {
      mod.alibi_slopes = numbers(accumulation(), int64_t(c_.batch) * c_.heads, 0.3);
      mod.slopes_batch_stride = c_.slopes_per_batch ? c_.heads : 0;
      mod.slopes_head_stride = 1;
      p.slopes_per_batch = c_.slopes_per_batch;
      p.dslopes = numbers(accumulation(), int64_t(c_.batch) * c_.heads, NAN);
    }
    if (c_.sink) {
      p.features.sink = {numbers(accumulation(), c_.heads, 2), 1};
      p.dsink = numbers(accumulation(), c_.heads, NAN);
    }
    if (c_.dropout_p > 0) {
      auto* state = static_cast<int64_t*>(memory_.allocate(2 * sizeof(int64_t)));
      state[0] = int64_t(generator_()), state[1] = int64_t(generator_() % 1000);
      p.features.dropout = {state, uint32_t(std::lround((1 - c_.dropout_p) * 65536)),
                            c_.dropout_p == 1 ? 0.f : float(1 / (1 - c_.dropout_p))};
    }
  }
  void weights() {
    static_cast<ForwardParams&>(w) = p;
    const int64_t pairs = int64_t(c_.batch) * c_.heads * c_.sq * c_.sk;
    w.average = below(2);
    w.weights = numbers(c_.dtype, pairs, NAN);
    w.dweights = numbers(c_.dtype, pairs, 1);
    w.dq = tensor(p.q_layout, c_.heads, c_.d, NAN);
    w.dk = tensor(p.k_layout, c_.heads_k, c_.d, NAN);
    w.dlse = row_values(NAN);
    if (c_.bias) {
      w.dbias = numbers(c_.bias_is_float32 ? DType::kFloat32 : c_.dtype, pairs, NAN);
      for (int dim = 0; dim < 4; ++dim) w.bias_shape[dim] = p.bias_shape[dim];
    }
  }
};

}  // namespace flash
