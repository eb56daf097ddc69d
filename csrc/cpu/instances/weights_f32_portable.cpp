// SPDX-License-Identifier: BSD-3-Clause
#include "cpu/kernels.h"
#include "cpu/weights.h"

namespace flash::cpu {

const WeightsKernels kWeightsF32Portable{run_weights, weights_backward_workspace_bytes,
                                         run_weights_backward};

}  // namespace flash::cpu
