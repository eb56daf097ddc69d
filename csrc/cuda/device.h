// SPDX-License-Identifier: BSD-3-Clause
// Errors of the CUDA runtime as exceptions, and attributes of the current device. Host only.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <stdexcept>
#include <string>

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

}  // namespace flash::cuda
