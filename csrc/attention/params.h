// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "attention/features.h"
#include "attention/mask.h"
#include "attention/seqlen.h"

namespace flash {

enum class DType : uint8_t { kFloat16, kBFloat16, kFloat32, kFloat64 };

/// Accumulation type: double for float64, else float. lse, slopes, sink and their gradients have
/// it.
FLASH_HOST_DEVICE int accumulation_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }
FLASH_HOST_DEVICE int element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

/// A tensor (batch, heads, rows, head_dim), or packed (heads, rows, head_dim); head_dim is
/// contiguous. Strides count elements and may be 0.
struct TensorView {
  void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;

  /// Offset of row 0 of a sequence and head.
  FLASH_HOST_DEVICE int64_t offset(const Sequence& s, int head) const {
    return s.batch_index * batch_stride + head * head_stride + s.first_row * row_stride;
  }
};

/// A tensor (batch, heads, rows), or packed (heads, rows), rows contiguous, of the accumulation
/// type.
struct RowView {
  void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0;

  FLASH_HOST_DEVICE int64_t offset(const Sequence& s, int head) const {
    return s.batch_index * batch_stride + head * head_stride + s.first_row;
  }
};

struct ForwardParams {
  DType dtype;
  int batch, num_heads, num_heads_k;  ///< num_heads % num_heads_k == 0
  int head_dim, head_dim_v;
  SequenceLayout q_layout, k_layout;
  TensorView q, k, v;  ///< (b, h, sq, d), (b, hk, sk, d), (b, hk, sk, dv)
  TensorView out;      ///< (b, h, sq, dv)
  RowView lse;         ///< (b, h, sq)
  double softmax_scale;
  MaskSpec mask;
  Features features;

  FLASH_HOST_DEVICE int gqa_ratio() const { return num_heads / num_heads_k; }
  FLASH_HOST_DEVICE Variant variant() const {
    return features.enabled() || !(softmax_scale > 0) ? Variant::kGeneral : Variant::kPlain;
  }
  FLASH_HOST_DEVICE IntervalMask mask_of(const Sequence& q_sequence,
                                         const Sequence& k_sequence) const {
    return mask.of(q_sequence.length, k_sequence.length);
  }
};

/// A null gradient is not wanted. Every gradient has the shape of its input; dbias, dslopes and
/// dsink are contiguous in the input's own (unbroadcast) shape.
struct BackwardParams : ForwardParams {
  TensorView dout;  ///< (b, h, sq, dv)
  RowView dlse;     ///< (b, h, sq); null data: zero
  TensorView dq, dk, dv;
  void* dbias = nullptr;    ///< dtype of the bias; on the CPU zeros: not all blocks are visited
  int bias_shape[4] = {};   ///< of the bias: each 1 or the full size of (b, h, sq, sk)
  void* dslopes = nullptr;  ///< accumulation type
  bool slopes_per_batch = false;
  void* dsink = nullptr;  ///< accumulation type, (h)
  bool deterministic = false;
};

/// W = exp(s - lse), after dropout, for one (b, h, sq, sk), or averaged over the heads, (b, sq,
/// sk). q, k, lse, mask and features as in the forward; v and out are unused. Contiguous, dtype of
/// q.
struct WeightsParams : ForwardParams {
  void* weights = nullptr;
  bool average = false;
};

/// Gradients of W. With dS = W o dW (before dropout's scale is undone, dW is averaged over the
/// heads when W was): dlse = -rowsum(dS), dq = scale dS k, dk = scale dS^T q, dbias = dS.
struct WeightsBackwardParams : WeightsParams {
  const void* dweights = nullptr;  ///< as weights
  TensorView dq, dk;
  RowView dlse;
  void* dbias = nullptr;  ///< dtype of the bias, its own shape
  int bias_shape[4] = {};
};

}  // namespace flash
