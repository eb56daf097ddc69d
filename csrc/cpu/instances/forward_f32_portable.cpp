// SPDX-License-Identifier: BSD-3-Clause
#include "cpu/forward.h"

namespace flash::cpu {

const ForwardKernels kForwardF32Portable{forward_workspace_bytes, forward};

}  // namespace flash::cpu
