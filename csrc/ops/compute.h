// SPDX-License-Identifier: BSD-3-Clause
// The raw operators on a given device: check, allocate, fill the parameters, run a backend.
#pragma once

#include "ops/backends.h"
#include "ops/inputs.h"

namespace flash::ops {

/// Softmax(scale q k^T ...) v and its logsumexp.
OutAndLse forward(const Inputs& raw, const Device& device);
/// Gradients of (out, lse) with respect to the inputs, recomputed from out and lse.
InputGradients backward(const Inputs& raw, const Gradients& gradients, const Device& device);
JointGradients backward(const JointInputs& raw, const Gradients& gradients, const Device& device);
/// exp(score - lse), per head or averaged over the heads.
at::Tensor weights(const WeightsInputs& raw, const Device& device);
WeightsGradients weights_backward(const at::Tensor& dweights, const WeightsInputs& raw,
                                  const Device& device);
/// Why no backend of `candidates` (or not the one named) can take the call.
std::vector<std::string> reasons_against(const Inputs& raw, const Device& device,
                                         const std::string& name, bool backward);

/// The inputs with one column of zeros where a head dimension has none: all scores are 0 then.
Inputs with_columns(const Inputs& in);

}  // namespace flash::ops
