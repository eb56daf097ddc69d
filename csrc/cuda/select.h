// SPDX-License-Identifier: BSD-3-Clause
// From a problem to the kernel that computes it. Host only, no CUDA: tested without a GPU.
#pragma once

#include <string>
#include <vector>

#include "cuda/spec.h"

namespace flash::cuda {

enum class Direction : uint8_t { kForward, kBackward };

/// The kernel that `arch` has for a problem it supports: a pure function of dtype, head dims and
/// variant.
KernelSpec select(Arch arch, const ForwardParams& p, Direction direction);

/// What decides whether a device runs an architecture's kernels.
struct DeviceLimits {
  int compute_capability;  ///< major 10 + minor; 0: there is no device
  int64_t shared_bytes;    ///< shared memory that a CTA may ask for
};

/// Why `arch` cannot take a problem on such a device; empty: it can.
std::vector<std::string> why_unsupported(Arch arch, const ForwardParams& p, Direction direction,
                                         const DeviceLimits& device);

}  // namespace flash::cuda
