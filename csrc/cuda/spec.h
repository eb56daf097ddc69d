// SPDX-License-Identifier: BSD-3-Clause
// What a CUDA kernel is compiled for. Anything absent here is a run-time value.
#pragma once

#include "attention/params.h"

namespace flash::cuda {

enum class Arch : uint8_t { kSimt, kSm80 };

struct KernelSpec {
  Arch arch;
  DType dtype;
  int head_dim;  ///< bucket: sm80, the larger of head_dim and head_dim_v; simt, columns of a panel
  Variant variant;

  constexpr bool operator==(const KernelSpec&) const = default;
};

}  // namespace flash::cuda
