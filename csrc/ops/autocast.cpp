// SPDX-License-Identifier: BSD-3-Clause
// Under autocast q, k, v and a float mask are each cast to the lower precision before anything else
// looks at them; float64 and bool stay, and so does lse.
#include <ATen/autocast_mode.h>

#include "ops/inputs.h"

namespace flash::ops {

namespace {

template <c10::DeviceType kDevice, size_t... kPositions>
void autocast(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const auto type = at::autocast::get_lower_precision_fp_from_device_type(kDevice);
  const size_t count = op.schema().arguments().size();
  const auto cast = [&](size_t position) {
    c10::IValue& value = torch::jit::peek(*stack, position, count);
    if (value.isTensor()) value = at::autocast::cached_cast(type, value.toTensor(), kDevice);
  };
  (cast(kPositions), ...);
  op.callBoxed(stack);
}

template <c10::DeviceType kDevice>
void register_autocast(torch::Library& m) {
  using torch::CppFunction;
  // query, key, value, attn_mask; q, k, v, bias; q, joint, bias; q, k, (lse,) bias
  m.impl("sdpa", CppFunction::makeFromBoxedFunction<&autocast<kDevice, 0, 1, 2, 3>>());
  m.impl("attention", CppFunction::makeFromBoxedFunction<&autocast<kDevice, 0, 1, 2, 3>>());
  m.impl("attention_joint", CppFunction::makeFromBoxedFunction<&autocast<kDevice, 0, 1, 2>>());
  m.impl("attention_weights", CppFunction::makeFromBoxedFunction<&autocast<kDevice, 0, 1, 3>>());
}

}  // namespace

TORCH_LIBRARY_IMPL(flash_attn, AutocastCPU, m) { register_autocast<at::kCPU>(m); }
TORCH_LIBRARY_IMPL(flash_attn, AutocastCUDA, m) { register_autocast<at::kCUDA>(m); }

}  // namespace flash::ops
