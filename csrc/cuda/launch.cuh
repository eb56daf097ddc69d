// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>

#include "attention/platform.h"
#include "cuda/device.h"

namespace flash::cuda {

FLASH_HOST_DEVICE constexpr int64_t ceil_div(int64_t x, int64_t step) {
  return (x + step - 1) / step;
}

/// A grid has one dimension, and a limit of 2^31 - 1; a kernel may have as much dynamic shared
/// memory as it asks for. That limit belongs to the kernel, whose launches may differ in size: the
/// lock keeps other threads from lowering it until this one has launched.
template <class... Parameters>
[[nodiscard]] std::unique_lock<std::mutex> prepare_launch(void (*kernel)(Parameters...),
                                                          int64_t ctas, size_t shared_bytes) {
  static std::mutex mutex;
  if (ctas > std::numeric_limits<int>::max())
    throw std::runtime_error("flash_attn: a problem of " + std::to_string(ctas) +
                             " thread blocks is larger than a CUDA grid (2147483647)");
  constexpr size_t kDefaultSharedBytes = 48 * 1024;
  if (shared_bytes <= kDefaultSharedBytes) return {};
  std::unique_lock<std::mutex> lock(mutex);
  FLASH_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  return lock;
}

/// Launches kernel(arguments...) on `ctas` CTAs. An empty grid launches nothing.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t ctas, int threads, size_t shared_bytes,
            void* stream, const Arguments&... arguments) {
  if (ctas == 0) return;
  const auto lock = prepare_launch(kernel, ctas, shared_bytes);
  kernel<<<unsigned(ctas), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      arguments...);
  FLASH_CUDA_CHECK(cudaGetLastError());
}

/// As launch, but CTAs may start before the previous kernel of the stream has ended, once all CTAs
/// of that have called ptx::launch_next_grid(); its results are there behind
/// ptx::wait_for_previous_grid(), which every grid must call before it ends.
template <class... Parameters, class... Arguments>
void launch_early(void (*kernel)(Parameters...), int64_t ctas, int threads, size_t shared_bytes,
                  void* stream, const Arguments&... arguments) {
  if (ctas == 0) return;
  const auto lock = prepare_launch(kernel, ctas, shared_bytes);
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  const cudaLaunchConfig_t config{.gridDim = dim3(unsigned(ctas)),
                                  .blockDim = dim3(unsigned(threads)),
                                  .dynamicSmemBytes = shared_bytes,
                                  .stream = static_cast<cudaStream_t>(stream),
                                  .attrs = &early,
                                  .numAttrs = 1};
  FLASH_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace flash::cuda
