// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "attention/params.h"
#include "primitives/tile/copy.cuh"

namespace flash::cuda {

/// The rows of one (sequence, head) of a tensor. Whether they come in aligned chunks of 16 bytes is
/// equal for the whole launch: all of its strides are looked at.
template <class Element>
FLASH_DEVICE GlobalMatrix<Element> matrix_of(const TensorView& tensor, const Sequence& sequence,
                                             int head, int head_dim) {
  constexpr int kChunk = 16 / sizeof(Element);
  const bool in_chunks =
      reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 &&
      (tensor.batch_stride | tensor.head_stride | tensor.row_stride | head_dim) % kChunk == 0;
  return {static_cast<Element*>(tensor.data) + tensor.offset(sequence, head), tensor.row_stride,
          sequence.length, head_dim, in_chunks};
}

}  // namespace flash::cuda
