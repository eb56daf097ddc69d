// SPDX-License-Identifier: BSD-3-Clause
// The CUDA key: current stream, device guard, and the Philox state of torch's CUDA generator.
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/backend.h"
#include "ops/keys.h"

namespace flash::ops {

namespace {

constexpr auto with_cuda = [](const at::Tensor& q, auto&& call) {
  const c10::cuda::CUDAGuard guard(q.device());
  return call(Device{at::kCUDA, cuda_backends(), c10::cuda::getCurrentCUDAStream().stream(),
                     /*workers=*/nullptr});
};

/// One draw: the generator advances by `increment` rounded up to a multiple of 4. Under graph
/// capture the state is behind pointers, so that a replay draws anew.
at::Tensor rng_state(Arguments arguments) {
  const at::Tensor like = arguments.tensor();
  const uint64_t increment = uint64_t(arguments.size().expect_int());
  const c10::cuda::CUDAGuard guard(like.device());
  at::Tensor result = at::empty({2}, like.options().dtype(at::kLong));
  auto* generator = at::check_generator<at::CUDAGeneratorImpl>(
      at::cuda::detail::getDefaultCUDAGenerator(like.device().index()));
  at::PhiloxCudaState state;
  {
    const std::lock_guard<std::mutex> lock(generator->mutex_);
    state = generator->philox_cuda_state((increment + 3) / 4 * 4);
  }
  const bool captured = state.captured_;
  cuda::store_rng_state(result.mutable_data_ptr<int64_t>(), captured ? 0 : state.seed_.val,
                        captured ? 0 : state.offset_.val, captured ? state.seed_.ptr : nullptr,
                        captured ? state.offset_.ptr : nullptr, state.offset_intragraph_,
                        c10::cuda::getCurrentCUDAStream().stream());
  return result;
}

}  // namespace

const std::vector<const Backend*>& cuda_backends() { return cuda::backends(); }

TORCH_LIBRARY_IMPL(flash_attn, CUDA, m) {
  register_kernels<with_cuda>(m);
  m.impl("rng_state", kernel<&rng_state>());
}

}  // namespace flash::ops
