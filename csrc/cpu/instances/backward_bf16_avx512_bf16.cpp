// SPDX-License-Identifier: BSD-3-Clause
#if !defined(__AVX512BF16__)
#error "needs the flags of csrc/build_kernels.py: without them tiles are slow arrays"
#endif
#define FLASH_CPU_BF16
#include "cpu/backward.h"
#include "cpu/kernels.h"

namespace flash::cpu {

const BackwardKernels kBackwardBf16Avx512Bf16{backward_workspace_bytes, run_backward};

}  // namespace flash::cpu
