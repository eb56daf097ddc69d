// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "attention/platform.h"

namespace flash {

/// Where the sequences of a call lie. Dense: every sequence has the length `max`, and rows are
/// found by the batch stride. Packed: sequence b owns the rows [cu_seqlens[b], cu_seqlens[b+1]) of
/// one long tensor. `seqused[b]`, where given, cuts the sequence short.
struct SequenceLayout {
  int max = 0;                          ///< length (dense) or bound on the lengths (packed)
  int64_t total = 0;                    ///< rows of the packed tensor
  const int32_t* cu_seqlens = nullptr;  ///< (batch + 1), null: dense
  const int32_t* seqused = nullptr;     ///< (batch), null: all

  FLASH_HOST_DEVICE bool packed() const { return cu_seqlens != nullptr; }
  /// Sequences have lengths of their own, and there may be rows that none of them owns.
  FLASH_HOST_DEVICE bool ragged() const { return packed() || seqused != nullptr; }
};

/// One sequence of a SequenceLayout. Out-of-range cu_seqlens and seqused, which only the device can
/// see, are cut to what the tensor holds, so that no kernel reads outside it.
struct Sequence {
  int64_t first_row;  ///< of the packed tensor; 0 when dense
  int batch_index;    ///< to be multiplied by the batch stride; 0 when packed
  int length;

  static FLASH_HOST_DEVICE Sequence of(const SequenceLayout& layout, int b) {
    Sequence s{0, b, layout.max};
    if (layout.packed()) {
      const int64_t begin = clamp(layout.cu_seqlens[b], layout.total);
      const int64_t length = clamp(layout.cu_seqlens[b + 1] - begin, layout.total - begin);
      s = {begin, 0, int(clamp(length, layout.max))};
    }
    if (layout.seqused) s.length = int(clamp(layout.seqused[b], s.length));
    return s;
  }

 private:
  static FLASH_HOST_DEVICE int64_t clamp(int64_t x, int64_t most) {
    return x < 0 ? 0 : x > most ? most : x;
  }
};

}  // namespace flash
