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

/// Multiprocessors of the current device; asked once per device.
inline int num_multiprocessors() {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];
  int device = 0, count = 0;
  FLASH_CUDA_CHECK(cudaGetDevice(&device));
  if (device < kMaxDevices && (count = known[device].load(std::memory_order_relaxed))) return count;
  FLASH_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  if (device < kMaxDevices) known[device].store(count, std::memory_order_relaxed);
  return count;
}

FLASH_HOST_DEVICE constexpr int64_t ceil_div(int64_t x, int64_t step) {
  return (x + step - 1) / step;
}

/// Launches kernel(arguments...) on `ctas` CTAs in one grid dimension (a limit of 2^31 - 1), with
/// as much dynamic shared memory as asked for. An empty grid launches nothing.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t ctas, int threads, size_t shared_bytes,
            void* stream, const Arguments&... arguments) {
  if (ctas == 0) return;
  if (ctas > std::numeric_limits<int>::max())
    throw std::runtime_error("flash_attn: a problem of " + std::to_string(ctas) +
                             " thread blocks is larger than a CUDA grid (2147483647)");
  constexpr size_t kDefaultSharedBytes = 48 * 1024;
  if (shared_bytes > kDefaultSharedBytes)
    FLASH_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          int(shared_bytes)));
  kernel<<<unsigned(ctas), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      arguments...);
  FLASH_CUDA_CHECK(cudaGetLastError());
}

}  // namespace flash::cuda
