// SPDX-License-Identifier: BSD-3-Clause
// Sizes and strides without data, for FakeTensor, torch.compile and torch.export.
#include <ATen/ops/empty.h>

#include "ops/checks.h"
#include "ops/inputs.h"
#include "ops/shapes.h"

namespace flash::ops {

namespace {

OutAndLse fwd(Arguments arguments) {
  const Inputs in = arguments.inputs();
  check_inputs(in);
  return empty_outputs(in);
}

InputGradients bwd(Arguments arguments) {
  const auto [in, gradients] = arguments.backward(&Arguments::inputs);
  check_inputs(in);
  check_gradients(in, gradients);
  return empty_gradients(in, gradients.needs);
}

JointGradients bwd_joint(Arguments arguments) {
  const auto [all, gradients] = arguments.backward(&Arguments::joint_inputs);
  check_inputs(all.inputs);
  check_gradients(all.inputs, gradients);
  return empty_gradients(all, gradients.needs);
}

at::Tensor rng_state(Arguments arguments) {
  return at::empty({2}, arguments.tensor().options().dtype(at::kLong));
}

at::Tensor weights(Arguments arguments) {
  const WeightsInputs all = arguments.weights_inputs();
  check_weights(all);
  return empty_weights(all);
}

WeightsGradients weights_bwd(Arguments arguments) {
  const at::Tensor dweights = arguments.tensor();
  const WeightsInputs all = arguments.weights_inputs();
  check_weights(all);
  check_weights_gradient(all, dweights);
  return empty_weights_gradients(all);
}

}  // namespace

TORCH_LIBRARY_IMPL(flash_attn, Meta, m) {
  m.impl("_fwd", kernel<&fwd>());
  m.impl("_bwd", kernel<&bwd>());
  m.impl("_bwd_joint", kernel<&bwd_joint>());
  m.impl("rng_state", kernel<&rng_state>());
  m.impl("attention_weights", kernel<&weights>());
  m.impl("_attention_weights_bwd", kernel<&weights_bwd>());
}

}  // namespace flash::ops
