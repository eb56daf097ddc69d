// SPDX-License-Identifier: BSD-3-Clause
#if !defined(__AVX512BF16__)
#error "needs the flags of csrc/build_kernels.py: without them tiles are slow arrays"
#endif
#define FLASH_CPU_BF16
#include "cpu/forward.h"

namespace flash::cpu {

const ForwardKernels kForwardBf16Avx512Bf16{forward_workspace_bytes, forward};

}  // namespace flash::cpu
