// SPDX-License-Identifier: BSD-3-Clause
#define FLASH_CPU_REAL double
#include "cpu/forward.h"

namespace flash::cpu {

const ForwardKernels kForwardF64Portable{forward_workspace_bytes, forward};

}  // namespace flash::cpu
