// SPDX-License-Identifier: BSD-3-Clause
// Sizes of a call, and the tensors that an operator returns. Meta kernels and real kernels allocate
// through the same functions, so their sizes and strides cannot differ.
#pragma once

#include "ops/inputs.h"

namespace flash::ops {

struct Shape {
  c10::SymInt batch, heads, heads_k;
  c10::SymInt rows_q, rows_k;    ///< packed: of the whole tensor; dense: of one sequence
  c10::SymInt bound_q, bound_k;  ///< no sequence is longer
  c10::SymInt head_dim, head_dim_v;
};
Shape shape_of(const Inputs& in);
Shape shape_of(const WeightsInputs& all);

at::ScalarType accumulation_type(at::ScalarType type);

/// A dense tensor whose dimensions lie in memory in the order of `like`'s, the last one innermost.
at::Tensor empty_following(const at::Tensor& like, c10::SymIntArrayRef sizes);
/// The gradient of `like`: its sizes, dense; `wanted` false: no elements.
at::Tensor empty_gradient(const at::Tensor& like, bool wanted);
/// A contiguous gradient of an optional tensor (bias, slopes, sink).
at::Tensor empty_contiguous_gradient(const at::Tensor& like, const at::Tensor& absent_like,
                                     bool wanted, at::ScalarType type);

OutAndLse empty_outputs(const Inputs& in);
InputGradients empty_gradients(const Inputs& in, const std::array<bool, 6>& needs);
/// needs[1] speaks for all of joint.
JointGradients empty_gradients(const JointInputs& all, const std::array<bool, 6>& needs);
at::Tensor empty_weights(const WeightsInputs& all);
WeightsGradients empty_weights_gradients(const WeightsInputs& all);

}  // namespace flash::ops
