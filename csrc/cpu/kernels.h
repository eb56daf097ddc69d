// SPDX-License-Identifier: BSD-3-Clause
// The seam between dispatch, which is compiled for every machine, and the kernels, which are
// compiled once per instruction set.
#pragma once

#include "attention/backend.h"

namespace flash::cpu {

/// The entries of one object. F32 kernels compute in float and take float32, bfloat16 and float16
/// (widened block by block); Bf16 kernels take bfloat16, F64 kernels float64.
struct ForwardKernels {
  int64_t (*workspace_bytes)(const ForwardParams&, int num_workers);
  void (*run)(const ForwardParams&, const Launch&);
};
struct BackwardKernels {
  int64_t (*workspace_bytes)(const BackwardParams&, int num_workers);
  void (*run)(const BackwardParams&, const Launch&);
};
struct WeightsKernels {
  void (*run)(const WeightsParams&, const Launch&);
  int64_t (*backward_workspace_bytes)(const WeightsBackwardParams&, int num_workers);
  void (*backward)(const WeightsBackwardParams&, const Launch&);
};

// Defined by instances/<kernel>_<type>_<isa>.cpp.
extern const ForwardKernels kForwardF32Portable, kForwardF64Portable;
extern const BackwardKernels kBackwardF32Portable, kBackwardF64Portable;
extern const WeightsKernels kWeightsF32Portable, kWeightsF64Portable;
#if defined(__x86_64__)
extern const ForwardKernels kForwardF32Avx2, kForwardF32Avx512, kForwardBf16Avx512Bf16,
    kForwardBf16Amx;
extern const BackwardKernels kBackwardF32Avx2, kBackwardF32Avx512, kBackwardBf16Avx512Bf16;
extern const WeightsKernels kWeightsF32Avx2, kWeightsF32Avx512;
#endif

}  // namespace flash::cpu
