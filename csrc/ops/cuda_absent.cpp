// SPDX-License-Identifier: BSD-3-Clause
// Stands in for cuda_keys.cpp in a build without CUDA: CUDA tensors get a sentence.
#include "ops/backends.h"
#include "ops/checks.h"

namespace flash::ops {

namespace {

void refuse(const c10::OperatorHandle& /*op*/, torch::jit::Stack* /*stack*/) {
  refuse_cuda_tensors();
}

}  // namespace

const std::vector<const Backend*>& cuda_backends() {
  static const std::vector<const Backend*> none;
  return none;
}

TORCH_LIBRARY_IMPL(flash_attn, CUDA, m) {
  for (const char* name : {"_fwd", "_bwd", "_bwd_joint", "rng_state", "attention_weights",
                           "_attention_weights_bwd", "_why_unsupported"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse>());
}

}  // namespace flash::ops
