// SPDX-License-Identifier: BSD-3-Clause
#define FLASH_CPU_REAL double
#include "cpu/kernels.h"
#include "cpu/weights.h"

namespace flash::cpu {

const WeightsKernels kWeightsF64Portable{run_weights, weights_backward_workspace_bytes,
                                         run_weights_backward};

}  // namespace flash::cpu
