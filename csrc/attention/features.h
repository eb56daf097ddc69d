// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "attention/dropout.h"
#include "attention/score_mod.h"

namespace flash {

/// One learned logit per query head that joins the denominator of the softmax only.
struct Sink {
  const void* logits = nullptr;  ///< accumulation type, (num_heads)
  int64_t head_stride = 0;

  FLASH_HOST_DEVICE bool enabled() const { return logits != nullptr; }
  template <class Real>
  FLASH_HOST_DEVICE Real of(int head) const {
    return static_cast<const Real*>(logits)[head * head_stride];
  }
};

/// What a kernel of Variant::kGeneral may have to do to a score or a weight, each a launch-uniform
/// branch. Kernels of Variant::kPlain are compiled without any of it.
struct Features {
  ScoreMod score_mod;
  Sink sink;
  Dropout dropout;

  FLASH_HOST_DEVICE bool enabled() const {
    return score_mod.enabled() || sink.enabled() || dropout.enabled();
  }
};

enum class Variant : uint8_t { kPlain, kGeneral };

}  // namespace flash
