// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "attention/platform.h"
#include "cuda/device.h"

namespace flash::cuda {

FLASH_HOST_DEVICE constexpr int64_t ceil_div(int64_t x, int64_t step) {
  return (x + step - 1) / step;
}

/// A kernel may have as much dynamic shared memory as it was told once, on each device. It is told
/// again only for more: never for less, which another thread may be about to launch with.
inline void allow_shared_bytes(const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (bytes <= kWithoutAsking) return;
  int device = 0;
  FLASH_CUDA_CHECK(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& known = allowed[{kernel, device}];
  if (bytes <= known) return;
  FLASH_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  known = bytes;
}

/// A grid has one dimension, and a limit of 2^31 - 1.
template <class... Parameters>
void prepare_launch(void (*kernel)(Parameters...), int64_t ctas, size_t shared_bytes) {
  if (ctas > std::numeric_limits<int>::max())
    throw std::runtime_error("flash_attn: a problem of " + std::to_string(ctas) +
                             " thread blocks is larger than a CUDA grid (2147483647)");
  allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes);
}

/// Launches kernel(arguments...) on `ctas` CTAs. An empty grid launches nothing.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t ctas, int threads, size_t shared_bytes,
            void* stream, const Arguments&... arguments) {
  if (ctas == 0) return;
  prepare_launch(kernel, ctas, shared_bytes);
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
  prepare_launch(kernel, ctas, shared_bytes);
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
