// SPDX-License-Identifier: BSD-3-Clause
// at::Tensor -> the PODs of attention/params.h. The only reader of strides and data pointers.
#pragma once

#include "attention/params.h"
#include "ops/inputs.h"

namespace flash::ops {

/// The inputs as kernels want them: a contiguous last dimension, int32 lengths, slopes and sink in
/// the accumulation type. Copies only what is not so already.
Inputs normalised(const Inputs& in);
/// `t` with a contiguous last dimension.
at::Tensor with_contiguous_rows(const at::Tensor& t);

// Views into tensors that outlive the call: inputs (normalised), and the outputs to be written.
ForwardParams forward_params(const Inputs& in, const OutAndLse& outputs);
BackwardParams backward_params(const Inputs& in, const Gradients& gradients,
                               const InputGradients& results);
WeightsParams weights_params(const WeightsInputs& all, const at::Tensor& weights);
WeightsBackwardParams weights_backward_params(const WeightsInputs& all, const at::Tensor& dweights,
                                              const WeightsGradients& results);

}  // namespace flash::ops
