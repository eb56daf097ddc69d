// SPDX-License-Identifier: BSD-3-Clause
#include "cpu/backward.h"
#include "cpu/kernels.h"

namespace flash::cpu {

const BackwardKernels kBackwardF32Portable{backward_workspace_bytes, run_backward};

}  // namespace flash::cpu
