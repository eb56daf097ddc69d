// SPDX-License-Identifier: BSD-3-Clause
// What a CUDA kernel is compiled for. Anything absent here is a run-time value.
#pragma once

#include "attention/params.h"

namespace flash::cuda {

enum class Arch : uint8_t { kSimt, kSm80, kSm90 };

struct KernelSpec {
  Arch arch;
  DType dtype;
  int head_dim;  ///< sm80, sm90: bucket of the larger head dim; simt: columns of a panel
  Variant variant;

  constexpr bool operator==(const KernelSpec&) const = default;
};

}  // namespace flash::cuda
