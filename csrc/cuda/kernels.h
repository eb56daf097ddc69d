// SPDX-License-Identifier: BSD-3-Clause
// The launchers that instances/*.cu define and dispatch.cpp calls. No device code: any host
// compiler reads this. `stream` is a cudaStream_t.
#pragma once

#include "cuda/spec.h"

namespace flash::cuda {

/// sm80, fp16 and bf16, buckets of tile_config.h's kSm80HeadDims.
namespace sm80 {

template <DType kDType, int kHeadDim, Variant kVariant>
void launch_forward(const ForwardParams& p, void* stream);

/// Writes dq, dk and dv (those that are not null) from q, k, v, dout, lse and `delta`, which is
/// complete. `scratch` has backward_scratch_bytes(p), uninitialised.
template <DType kDType, int kHeadDim, Variant kVariant>
void launch_backward(const BackwardParams& p, const RowView& delta, void* scratch, void* stream);

/// For example the fp32 accumulator of dq.
int64_t backward_scratch_bytes(const BackwardParams& p);

}  // namespace sm80

}  // namespace flash::cuda
