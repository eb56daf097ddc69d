// SPDX-License-Identifier: BSD-3-Clause
// The launchers that instances/*.cu define and dispatch.cpp calls. No device code: any host
// compiler reads this. `stream` is a cudaStream_t.
#pragma once

#include "cuda/spec.h"

namespace flash::cuda {

// Kernels of every backend (common/), for each dtype.

enum class Fill : uint8_t { kUnowned, kAll };  ///< which rows: those that no sequence owns, or all

/// Rows 0, and -inf in lse if it has data.
template <DType kDType>
void launch_fill_rows(const TensorView& view, const RowView& lse, const SequenceLayout& layout,
                      int num_heads, int batch, int width, Fill fill, void* stream);
template <DType kDType>
void launch_backward_delta(const BackwardParams& p, const RowView& delta, void* stream);
template <DType kDType, class Params>
void launch_backward_bias(const Params& p, const RowView& delta, void* stream);
/// `partials` has room for batch x heads x ceil(seqlen_q / simt_rows(dtype)) numbers.
template <DType kDType>
void launch_backward_slopes(const BackwardParams& p, const RowView& delta, void* partials,
                            void* stream);
template <DType kDType>
void launch_backward_sink(const BackwardParams& p, const RowView& delta, void* stream);

/// Every dtype and head dim; kPanel and kVariant as select.cpp has them.
namespace simt {

template <DType kDType, int kPanel, Variant kVariant>
void launch_forward(const ForwardParams& p, void* stream);
/// dq, dk and dv, those that are not null, from q, k, v, dout, lse and `delta`.
template <DType kDType, int kPanel, Variant kVariant>
void launch_backward(const BackwardParams& p, const RowView& delta, void* stream);
template <DType kDType>
void launch_weights(const WeightsParams& p, void* stream);
template <DType kDType>
void launch_weights_backward(const WeightsBackwardParams& p, void* stream);

}  // namespace simt

/// fp16 and bf16, buckets of tile_config.h's kSm80HeadDims.
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
