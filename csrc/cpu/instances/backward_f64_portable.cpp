// SPDX-License-Identifier: BSD-3-Clause
#define FLASH_CPU_REAL double
#include "cpu/backward.h"
#include "cpu/kernels.h"

namespace flash::cpu {

const BackwardKernels kBackwardF64Portable{backward_workspace_bytes, run_backward};

}  // namespace flash::cpu
