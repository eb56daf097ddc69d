// SPDX-License-Identifier: BSD-3-Clause
#include "ops/make_params.h"

#include <algorithm>
#include <cmath>

#include "ops/shapes.h"

namespace flash::ops {

namespace {

void* input_data(const at::Tensor& t) { return const_cast<void*>(t.const_data_ptr()); }
void* output_data(const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

TensorView view_of(void* data, const at::Tensor& t) {
  return t.dim() == 3 ? TensorView{data, 0, t.stride(1), t.stride(0)}
                      : TensorView{data, t.stride(0), t.stride(1), t.stride(2)};
}
TensorView input_view(const at::Tensor& t) { return view_of(input_data(t), t); }
TensorView output_view(const at::Tensor& t) {
  return t.numel() == 0 ? TensorView{} : view_of(output_data(t), t);
}

RowView rows_of(void* data, const at::Tensor& t) {
  return t.dim() == 2 ? RowView{data, 0, t.stride(0)} : RowView{data, t.stride(0), t.stride(1)};
}

PairView pairs_of(const at::Tensor& t) {
  if (!t.defined()) return {};
  const auto stride = [&](int dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); };
  return {input_data(t), stride(0), stride(1), stride(2), stride(3)};
}

DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kFloat:
      return DType::kFloat32;
    default:
      return DType::kFloat64;
  }
}

SequenceLayout layout_of(const c10::SymInt& bound, int64_t rows, const at::Tensor& cu_seqlens,
                         const at::Tensor& seqused) {
  SequenceLayout layout{.max = int(bound.expect_int()), .total = rows};
  if (cu_seqlens.defined()) layout.cu_seqlens = cu_seqlens.const_data_ptr<int32_t>();
  if (seqused.defined()) layout.seqused = seqused.const_data_ptr<int32_t>();
  return layout;
}

int window_bound(const std::optional<c10::SymInt>& bound) {
  constexpr int64_t kUnbounded = IntervalMask::kUnbounded;
  return bound ? int(std::clamp(bound->expect_int(), -kUnbounded, kUnbounded))
               : IntervalMask::kUnbounded;
}

MaskSpec mask_spec(const Inputs& in) {
  return {.bottom_right = in.bottom_right,
          .window_left = window_bound(in.window_left),
          .window_right = window_bound(in.window_right),
          .prefix = int(std::min<int64_t>(in.prefix.expect_int(), IntervalMask::kUnbounded))};
}

Dropout dropout_of(const Inputs& in) {
  const double keep = 1 - in.dropout_p;
  if (keep == 1) return {};  // 1e-30 is how some ask for the lse: no bit may change
  return {.rng_state = in.rng_state.const_data_ptr<int64_t>(),
          .threshold = uint32_t(std::lround(keep * 65536)),
          .scale = keep > 0 ? 1 / keep : 0};
}

Features features_of(const Inputs& in) {
  Features features;
  ScoreMod& mod = features.score_mod;
  mod.softcap = in.softcap;
  mod.bias = pairs_of(in.bias);
  mod.bias_is_float32 = in.bias.defined() && in.bias.scalar_type() == at::kFloat;
  mod.mask = pairs_of(in.mask);
  if (in.alibi_slopes.defined()) {
    mod.alibi_slopes = input_data(in.alibi_slopes);
    mod.slopes_batch_stride = in.alibi_slopes.dim() == 2 ? in.alibi_slopes.stride(0) : 0;
    mod.slopes_head_stride = in.alibi_slopes.stride(-1);
  }
  if (in.sink.defined()) features.sink = {input_data(in.sink), in.sink.stride(0)};
  features.dropout = dropout_of(in);
  return features;
}

template <class Params>
void set_problem(Params& p, const Inputs& in) {
  const Shape s = shape_of(in);
  p.dtype = dtype_of(in.q);
  p.batch = int(s.batch.expect_int());
  p.num_heads = int(s.heads.expect_int());
  p.num_heads_k = int(s.heads_k.expect_int());
  p.head_dim = int(s.head_dim.expect_int());
  p.head_dim_v = int(s.head_dim_v.expect_int());
  p.q_layout = layout_of(s.bound_q, s.rows_q.expect_int(), in.cu_seqlens_q, in.seqused_q);
  p.k_layout = layout_of(s.bound_k, s.rows_k.expect_int(), in.cu_seqlens_k, in.seqused_k);
  p.q = input_view(in.q);
  p.k = input_view(in.k);
  p.v = input_view(in.v);
  p.softmax_scale = in.scale;
  p.mask = mask_spec(in);
  p.features = features_of(in);
}

void set_bias_gradient(void*& dbias, int (&shape)[4], const at::Tensor& bias,
                       const at::Tensor& result) {
  if (!bias.defined() || result.numel() == 0) return;
  dbias = output_data(result);
  for (int dim = 0; dim < 4; ++dim) shape[dim] = int(bias.size(dim));
}

}  // namespace

at::Tensor with_contiguous_rows(const at::Tensor& t) {
  if (!t.defined() || t.stride(-1) == 1 || t.size(-1) <= 1) return t;
  return t.contiguous();
}

Inputs normalised(const Inputs& in) {
  Inputs out = in;
  const at::ScalarType accumulation = accumulation_type(in.q.scalar_type());
  for (at::Tensor* t : {&out.q, &out.k, &out.v}) *t = with_contiguous_rows(*t);
  for (at::Tensor* t : {&out.alibi_slopes, &out.sink})
    if (t->defined()) *t = t->to(accumulation);
  for (at::Tensor* t : {&out.cu_seqlens_q, &out.cu_seqlens_k, &out.seqused_q, &out.seqused_k})
    if (t->defined()) *t = t->to(at::kInt).contiguous();
  if (out.rng_state.defined()) out.rng_state = out.rng_state.contiguous();
  return out;
}

ForwardParams forward_params(const Inputs& in, const OutAndLse& outputs) {
  ForwardParams p{};
  set_problem(p, in);
  const auto& [out, lse] = outputs;
  p.out = view_of(output_data(out), out);
  p.lse = rows_of(output_data(lse), lse);
  return p;
}

BackwardParams backward_params(const Inputs& in, const Gradients& gradients,
                               const InputGradients& results) {
  BackwardParams p{};
  set_problem(p, in);
  const auto& [dq, dk, dv, dbias, dslopes, dsink] = results;
  p.out = input_view(gradients.out);
  p.lse = rows_of(input_data(gradients.lse), gradients.lse);
  p.dout = input_view(gradients.dout);
  if (gradients.dlse.defined()) p.dlse = rows_of(input_data(gradients.dlse), gradients.dlse);
  p.dq = output_view(dq);
  p.dk = output_view(dk);
  p.dv = output_view(dv);
  set_bias_gradient(p.dbias, p.bias_shape, in.bias, dbias);
  if (dslopes.numel() != 0) p.dslopes = output_data(dslopes);
  p.slopes_per_batch = in.alibi_slopes.defined() && in.alibi_slopes.dim() == 2;
  if (dsink.numel() != 0) p.dsink = output_data(dsink);
  p.deterministic = gradients.deterministic;
  return p;
}

WeightsParams weights_params(const WeightsInputs& all, const at::Tensor& weights) {
  WeightsParams p{};
  Inputs in = all.inputs;
  in.v = in.k;
  set_problem(p, in);
  p.v = {};
  p.lse = rows_of(input_data(all.lse), all.lse);
  p.weights = weights.defined() ? output_data(weights) : nullptr;
  p.average = all.average;
  return p;
}

WeightsBackwardParams weights_backward_params(const WeightsInputs& all, const at::Tensor& dweights,
                                              const WeightsGradients& results) {
  WeightsBackwardParams p{};
  static_cast<WeightsParams&>(p) = weights_params(all, at::Tensor());
  const auto& [dq, dk, dlse, dbias] = results;
  p.dweights = input_data(dweights);
  p.dq = output_view(dq);
  p.dk = output_view(dk);
  p.dlse = rows_of(output_data(dlse), dlse);
  set_bias_gradient(p.dbias, p.bias_shape, all.inputs.bias, dbias);
  return p;
}

}  // namespace flash::ops
