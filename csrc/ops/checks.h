// SPDX-License-Identifier: BSD-3-Clause
// Every message that user input can cause, and nothing else. Sizes may be symbolic: a check on one
// becomes a guard of the compiled graph. Values of tensors are looked at on the CPU only.
#pragma once

#include <string>
#include <vector>

#include "ops/inputs.h"

namespace flash::ops {

// Arguments of scaled_dot_product_attention, with torch's own texts.
void check_sdpa(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                const at::Tensor& mask, bool is_causal);
void check_gqa(const c10::SymInt& heads, const c10::SymInt& heads_k, const c10::SymInt& heads_v);
/// `mask` must broadcast to `scores` (..., H, L, S) without enlarging it.
void check_mask_broadcasts(const at::Tensor& mask, c10::SymIntArrayRef scores);
void check_dropout(double dropout_p);

/// Ranks, dtypes, devices and sizes of the raw operators.
void check_inputs(const Inputs& in);
void check_weights(const WeightsInputs& all);
void check_weights_gradient(const WeightsInputs& all, const at::Tensor& dweights);
/// `t`, if there is one, is no leaf or intermediate that wants a gradient.
void check_no_gradient(const char* name, const at::Tensor& t);
/// dout, dlse, out and lse of _bwd against its inputs.
void check_gradients(const Inputs& in, const Gradients& gradients);
/// cu_seqlens and seqused on the CPU: in range, ascending, no sequence longer than announced.
void check_lengths(const Inputs& in);

[[noreturn]] void refuse_backend(const std::string& name, const std::vector<std::string>& reasons);
[[noreturn]] void refuse_device(const std::string& name, c10::DeviceType device,
                                const std::string& candidates);
[[noreturn]] void refuse_all_backends(const std::vector<std::string>& reasons);
[[noreturn]] void refuse_backend_name(const std::string& name, const std::string& known);
[[noreturn]] void refuse_cuda_tensors();

}  // namespace flash::ops
