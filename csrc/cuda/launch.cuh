// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "attention/platform.h"

#define FLASH_CUDA_CHECK(call) ::flash::cuda::check((call), #call, __FILE__, __LINE__)

namespace flash::cuda {

inline void check(cudaError_t status, const char* call, const char* file, int line) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("flash_attn: ") + cudaGetErrorString(status) + " in " +
                           call + " at " + file + ":" + std::to_string(line));
}

/// An attribute of the current device; asked once per device.
template <cudaDeviceAttr kAttribute>
int device_attribute() {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];
  int device = 0, value = 0;
  FLASH_CUDA_CHECK(cudaGetDevice(&device));
  if (device < kMaxDevices && (value = known[device].load(std::memory_order_relaxed))) return value;
  FLASH_CUDA_CHECK(cudaDeviceGetAttribute(&value, kAttribute, device));
  if (device < kMaxDevices) known[device].store(value, std::memory_order_relaxed);
  return value;
}
inline int num_multiprocessors() { return device_attribute<cudaDevAttrMultiProcessorCount>(); }
/// Shared memory that one CTA can have, and that all CTAs of a multiprocessor share.
inline int max_shared_bytes() {
  return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>();
}
inline int shared_bytes_per_multiprocessor() {
  return device_attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>();
}

FLASH_HOST_DEVICE constexpr int64_t ceil_div(int64_t x, int64_t step) {
  return (x + step - 1) / step;
}

/// A grid has one dimension, and a limit of 2^31 - 1; a kernel may have as much dynamic shared
/// memory as it asks for.
template <class... Parameters>
void prepare_launch(void (*kernel)(Parameters...), int64_t ctas, size_t shared_bytes) {
  if (ctas > std::numeric_limits<int>::max())
    throw std::runtime_error("flash_attn: a problem of " + std::to_string(ctas) +
                             " thread blocks is larger than a CUDA grid (2147483647)");
  constexpr size_t kDefaultSharedBytes = 48 * 1024;
  if (shared_bytes > kDefaultSharedBytes)
    FLASH_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          int(shared_bytes)));
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
