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

/// Why `arch` cannot take a problem on a device of this compute capability (major 10 + minor);
/// empty: it can.
std::vector<std::string> why_unsupported(Arch arch, const ForwardParams& p, Direction direction,
                                         int compute_capability);

}  // namespace flash::cuda
