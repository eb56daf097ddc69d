// SPDX-License-Identifier: BSD-3-Clause
#include "ops/shapes.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#include <numeric>

namespace flash::ops {

namespace {

using SymSizes = c10::SmallVector<c10::SymInt, 5>;

/// Whether dimension b of `t` lies outside of a: -1 inside, 1 outside, 0 no telling (a dimension of
/// one element or of stride 0 lies anywhere).
int compare_order(const at::Tensor& t, int64_t a, int64_t b) {
  const auto sizes = t.sym_sizes(), strides = t.sym_strides();
  if (sizes[a] == 1 || sizes[b] == 1 || strides[a] == 0 || strides[b] == 0) return 0;
  if (strides[a] == strides[b]) return 0;
  return strides[a] < strides[b] ? -1 : 1;
}

/// Dimensions 0 .. rank - 2 of `t`, innermost first. Insertion sort, because the order is partial.
c10::SmallVector<int64_t, 5> dimensions_inside_out(const at::Tensor& t) {
  c10::SmallVector<int64_t, 5> order(t.dim() - 1);
  std::iota(order.rbegin(), order.rend(), 0);
  for (int64_t i = 1; i < int64_t(order.size()); ++i) {
    int64_t moving = i;
    for (int64_t j = i - 1; j >= 0; --j) {
      const int comparison = compare_order(t, order[j], order[moving]);
      if (comparison < 0) break;
      if (comparison > 0) {
        std::swap(order[j], order[moving]);
        moving = j;
      }
    }
  }
  return order;
}

at::Tensor empty(c10::SymIntArrayRef sizes, const at::TensorOptions& options) {
  return at::empty_symint(sizes, options);
}

SymSizes sizes_with_last(const at::Tensor& t, const c10::SymInt& last) {
  SymSizes sizes(t.sym_sizes().begin(), t.sym_sizes().end());
  sizes.back() = last;
  return sizes;
}

}  // namespace

at::ScalarType accumulation_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

Shape shape_of(const Inputs& in) {
  const at::Tensor &q = in.q, &k = in.k, &v = in.v;
  if (!in.packed())
    return {.batch = q.sym_size(0),
            .heads = q.sym_size(1),
            .heads_k = k.sym_size(1),
            .rows_q = q.sym_size(2),
            .rows_k = k.sym_size(2),
            .bound_q = q.sym_size(2),
            .bound_k = k.sym_size(2),
            .head_dim = q.sym_size(3),
            .head_dim_v = v.sym_size(3)};
  const auto bound = [](const c10::SymInt& announced, const c10::SymInt& rows) {
    return announced == 0 ? rows : announced;
  };
  return {.batch = in.cu_seqlens_q.sym_size(0) - 1,
          .heads = q.sym_size(1),
          .heads_k = k.sym_size(1),
          .rows_q = q.sym_size(0),
          .rows_k = k.sym_size(0),
          .bound_q = bound(in.max_seqlen_q, q.sym_size(0)),
          .bound_k = bound(in.max_seqlen_k, k.sym_size(0)),
          .head_dim = q.sym_size(2),
          .head_dim_v = v.sym_size(2)};
}

Shape shape_of(const WeightsInputs& all) {
  Inputs in = all.inputs;
  in.v = in.k;
  return shape_of(in);
}

at::Tensor empty_following(const at::Tensor& like, c10::SymIntArrayRef sizes) {
  SymSizes strides(sizes.size());
  c10::SymInt stride = sizes.back();
  strides.back() = 1;
  for (const int64_t dim : dimensions_inside_out(like)) {
    strides[dim] = stride;
    if (sizes[dim] != 0) stride = stride * sizes[dim];
  }
  if (sizes.back() == 0) return empty(sizes, like.options());
  return at::empty_strided_symint(sizes, strides, like.options());
}

at::Tensor empty_gradient(const at::Tensor& like, bool wanted) {
  return wanted ? empty_following(like, like.sym_sizes()) : empty({0}, like.options());
}

at::Tensor empty_contiguous_gradient(const at::Tensor& like, const at::Tensor& absent_like,
                                     bool wanted, at::ScalarType type) {
  if (!wanted || !like.defined()) return empty({0}, absent_like.options());
  return empty(like.sym_sizes(), like.options().dtype(type));
}

OutAndLse empty_outputs(const Inputs& in) {
  const at::Tensor& q = in.q;
  const auto lse_options = q.options().dtype(accumulation_type(q.scalar_type()));
  at::Tensor out = empty_following(q, sizes_with_last(q, in.v.sym_size(-1)));
  at::Tensor lse = in.packed() ? empty({q.sym_size(1), q.sym_size(0)}, lse_options)
                               : empty({q.sym_size(0), q.sym_size(1), q.sym_size(2)}, lse_options);
  return {out, lse};
}

InputGradients empty_gradients(const Inputs& in, const std::array<bool, 6>& needs) {
  const auto optional = [&](const at::Tensor& t, bool wanted) {
    return empty_contiguous_gradient(t, in.q, wanted, t.defined() ? t.scalar_type() : at::kFloat);
  };
  return {empty_gradient(in.q, needs[0]),      empty_gradient(in.k, needs[1]),
          empty_gradient(in.v, needs[2]),      optional(in.bias, needs[3]),
          optional(in.alibi_slopes, needs[4]), optional(in.sink, needs[5])};
}

JointGradients empty_gradients(const JointInputs& all, const std::array<bool, 6>& needs) {
  const auto [none, dk, dv, dbias, dslopes, dsink] =
      empty_gradients(all.inputs, {false, false, false, needs[3], needs[4], needs[5]});
  return {all.joins_q() ? none : empty_gradient(all.q, needs[0]),
          empty_gradient(all.joint, needs[1]), dbias, dslopes, dsink};
}

at::Tensor empty_weights(const WeightsInputs& all) {
  const Shape s = shape_of(all);
  const auto options = all.inputs.q.options();
  return all.average ? empty({s.batch, s.rows_q, s.rows_k}, options)
                     : empty({s.batch, s.heads, s.rows_q, s.rows_k}, options);
}

WeightsGradients empty_weights_gradients(const WeightsInputs& all) {
  const Inputs& in = all.inputs;
  const at::Tensor dbias = empty_contiguous_gradient(
      in.bias, in.q, in.bias.defined(), in.bias.defined() ? in.bias.scalar_type() : at::kFloat);
  return {empty_gradient(in.q, true), empty_gradient(in.k, true),
          empty(all.lse.sym_sizes(), all.lse.options()), dbias};
}

}  // namespace flash::ops
