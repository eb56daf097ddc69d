// SPDX-License-Identifier: BSD-3-Clause
// The CPU key: torch's threads, and the seed of a dropout call from torch's CPU generator.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/empty.h>

#include "ops/keys.h"
#include "ops/workers.h"

namespace flash::ops {

namespace {

constexpr auto with_cpu = [](const at::Tensor& /*q*/, auto&& call) {
  TorchWorkers workers;
  return call(Device{at::kCPU, cpu_backends(), /*stream=*/nullptr, &workers});
};

at::Tensor rng_state(Arguments arguments) {
  const at::Tensor like = arguments.tensor();
  auto* generator = at::check_generator<at::CPUGeneratorImpl>(at::detail::getDefaultCPUGenerator());
  at::Tensor state = at::empty({2}, like.options().dtype(at::kLong));
  auto* values = state.mutable_data_ptr<int64_t>();
  const std::lock_guard<std::mutex> lock(generator->mutex_);
  values[0] = int64_t(generator->random64());
  values[1] = 0;
  return state;
}

}  // namespace

TORCH_LIBRARY_IMPL(flash_attn, CPU, m) {
  register_kernels<with_cpu>(m);
  m.impl("rng_state", kernel<&rng_state>());
}

}  // namespace flash::ops
