// SPDX-License-Identifier: BSD-3-Clause
// The kernels of a dispatch key, given how a call reaches its device. `With` is a function that
// takes a tensor of the call and a callback, and calls back with the Device.
#pragma once

#include "ops/compute.h"

namespace flash::ops {

template <auto kWith>
OutAndLse fwd_kernel(Arguments arguments) {
  const Inputs in = arguments.inputs();
  return kWith(in.q, [&](const Device& device) { return forward(in, device); });
}

template <auto kWith>
InputGradients bwd_kernel(Arguments arguments) {
  const auto [in, gradients] = arguments.backward(&Arguments::inputs);
  return kWith(in.q, [&](const Device& device) { return backward(in, gradients, device); });
}

template <auto kWith>
JointGradients bwd_joint_kernel(Arguments arguments) {
  const auto [all, gradients] = arguments.backward(&Arguments::joint_inputs);
  return kWith(all.joint, [&](const Device& device) { return backward(all, gradients, device); });
}

template <auto kWith>
at::Tensor weights_kernel(Arguments arguments) {
  const WeightsInputs all = arguments.weights_inputs();
  return kWith(all.inputs.q, [&](const Device& device) { return weights(all, device); });
}

template <auto kWith>
WeightsGradients weights_bwd_kernel(Arguments arguments) {
  const at::Tensor dweights = arguments.tensor();
  const WeightsInputs all = arguments.weights_inputs();
  return kWith(all.inputs.q,
               [&](const Device& device) { return weights_backward(dweights, all, device); });
}

template <auto kWith>
std::vector<std::string> why_unsupported_kernel(Arguments arguments) {
  const Inputs in = arguments.inputs();
  const std::string name = arguments.text();
  const bool backward = arguments.flag();
  return kWith(in.q,
               [&](const Device& device) { return reasons_against(in, device, name, backward); });
}

template <auto kWith>
void register_kernels(torch::Library& m) {
  m.impl("_fwd", kernel<&fwd_kernel<kWith>>());
  m.impl("_bwd", kernel<&bwd_kernel<kWith>>());
  m.impl("_bwd_joint", kernel<&bwd_joint_kernel<kWith>>());
  m.impl("attention_weights", kernel<&weights_kernel<kWith>>());
  m.impl("_attention_weights_bwd", kernel<&weights_bwd_kernel<kWith>>());
  m.impl("_why_unsupported", kernel<&why_unsupported_kernel<kWith>>());
}

}  // namespace flash::ops
