// SPDX-License-Identifier: BSD-3-Clause
#include "ops/inputs.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace flash::ops {

namespace {

c10::OperatorHandle find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

c10::IValue optional_size(const std::optional<c10::SymInt>& size) {
  return size ? c10::IValue(*size) : c10::IValue();
}

}  // namespace

std::array<at::Tensor, 3> parts_of(const at::Tensor& joint, bool joins_q) {
  const int64_t count = joins_q ? 3 : 2, dim = joint.dim() - 3;
  TORCH_CHECK(dim == 1 || dim == 2, "flash_attn: expected joint (batch, seqlen, ", count,
              ", heads, head_dim) or packed (tokens, ", count, ", heads, head_dim), got ",
              joint.dim(), " dimensions");
  TORCH_CHECK(joint.sym_size(dim) == count, "flash_attn: expected joint of ", count,
              joins_q ? " parts, q, k and v" : " parts, k and v", ", got ", joint.sym_size(dim));
  const auto part = [&](int64_t index) {
    const at::Tensor rows = joint.select(dim, index);
    return dim == 2 ? rows.transpose(1, 2) : rows;
  };
  return {joins_q ? part(0) : at::Tensor(), part(count - 2), part(count - 1)};
}

Inputs Arguments::inputs() {
  Inputs in;
  in.q = tensor();
  in.k = tensor();
  in.v = tensor();
  read_options(in);
  return in;
}

JointInputs Arguments::joint_inputs() {
  JointInputs all;
  all.q = tensor();
  all.joint = tensor();
  const auto [q, k, v] = parts_of(all.joint, all.joins_q());
  all.inputs.q = all.joins_q() ? q : all.q;
  all.inputs.k = k;
  all.inputs.v = v;
  read_options(all.inputs);
  return all;
}

void Arguments::read_options(Inputs& in) {
  for (at::Tensor* member : {&in.bias, &in.mask, &in.alibi_slopes, &in.sink, &in.cu_seqlens_q,
                             &in.cu_seqlens_k, &in.seqused_q, &in.seqused_k, &in.rng_state})
    *member = tensor();
  in.max_seqlen_q = size();
  in.max_seqlen_k = size();
  in.bottom_right = flag();
  in.window_left = optional_size();
  in.window_right = optional_size();
  in.prefix = size();
  in.scale = number();
  in.softcap = number();
  in.dropout_p = number();
}

void push(torch::jit::Stack& stack, const at::Tensor& tensor) {
  stack.emplace_back(tensor.defined() ? c10::IValue(tensor) : c10::IValue());
}

namespace {

/// All that follows q, k and v.
void push_options(torch::jit::Stack& stack, const Inputs& in) {
  for (const at::Tensor* member : {&in.bias, &in.mask, &in.alibi_slopes, &in.sink, &in.cu_seqlens_q,
                                   &in.cu_seqlens_k, &in.seqused_q, &in.seqused_k, &in.rng_state})
    push(stack, *member);
  stack.emplace_back(in.max_seqlen_q);
  stack.emplace_back(in.max_seqlen_k);
  stack.emplace_back(in.bottom_right);
  stack.push_back(optional_size(in.window_left));
  stack.push_back(optional_size(in.window_right));
  stack.emplace_back(in.prefix);
  stack.emplace_back(in.scale);
  stack.emplace_back(in.softcap);
  stack.emplace_back(in.dropout_p);
}

}  // namespace

void push(torch::jit::Stack& stack, const Inputs& in) {
  for (const at::Tensor* member : {&in.q, &in.k, &in.v}) push(stack, *member);
  push_options(stack, in);
}

void push(torch::jit::Stack& stack, const JointInputs& all) {
  push(stack, all.q);
  push(stack, all.joint);
  push_options(stack, all.inputs);
}

WeightsInputs Arguments::weights_inputs() {
  WeightsInputs all;
  Inputs& in = all.inputs;
  for (at::Tensor* member :
       {&in.q, &in.k, &all.lse, &in.bias, &in.mask, &in.alibi_slopes, &in.rng_state})
    *member = tensor();
  in.bottom_right = flag();
  in.window_left = optional_size();
  in.window_right = optional_size();
  in.prefix = size();
  in.scale = number();
  in.softcap = number();
  in.dropout_p = number();
  all.average = flag();
  return all;
}

void push(torch::jit::Stack& stack, const WeightsInputs& all) {
  const Inputs& in = all.inputs;
  for (const at::Tensor* member :
       {&in.q, &in.k, &all.lse, &in.bias, &in.mask, &in.alibi_slopes, &in.rng_state})
    push(stack, *member);
  stack.emplace_back(in.bottom_right);
  stack.push_back(optional_size(in.window_left));
  stack.push_back(optional_size(in.window_right));
  stack.emplace_back(in.prefix);
  stack.emplace_back(in.scale);
  stack.emplace_back(in.softcap);
  stack.emplace_back(in.dropout_p);
  stack.emplace_back(all.average);
}

std::array<bool, 6> Arguments::needs() {
  const auto list = next().toBoolList();
  TORCH_CHECK(list.size() == 6, "flash_attn: expected needs to hold 6 flags, got ", list.size());
  std::array<bool, 6> flags{};
  for (size_t i = 0; i < flags.size(); ++i) flags[i] = list[i];
  return flags;
}

OutAndLse call_attention(const Inputs& inputs, bool deterministic) {
  static const auto op = find("flash_attn::attention");
  torch::jit::Stack stack;
  push(stack, inputs);
  stack.emplace_back(deterministic);
  op.callBoxed(&stack);
  return {stack[0].toTensor(), stack[1].toTensor()};
}

OutAndLse call_fwd(const Inputs& inputs) {
  static const auto op = find("flash_attn::_fwd");
  torch::jit::Stack stack;
  push(stack, inputs);
  op.callBoxed(&stack);
  return {stack[0].toTensor(), stack[1].toTensor()};
}

namespace {

template <class AnyInputs>
torch::jit::Stack backward_stack(const AnyInputs& inputs, const Gradients& gradients) {
  torch::jit::Stack stack;
  push(stack, gradients.dout);
  push(stack, gradients.dlse);
  push(stack, inputs);
  push(stack, gradients.out);
  push(stack, gradients.lse);
  stack.emplace_back(gradients.deterministic);
  c10::List<bool> needs;
  for (const bool flag : gradients.needs) needs.push_back(flag);
  stack.emplace_back(needs);
  return stack;
}

}  // namespace

InputGradients call_bwd(const Inputs& inputs, const Gradients& gradients) {
  static const auto op = find("flash_attn::_bwd");
  torch::jit::Stack stack = backward_stack(inputs, gradients);
  op.callBoxed(&stack);
  return {stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor(),
          stack[3].toTensor(), stack[4].toTensor(), stack[5].toTensor()};
}

JointGradients call_bwd_joint(const JointInputs& inputs, const Gradients& gradients) {
  static const auto op = find("flash_attn::_bwd_joint");
  torch::jit::Stack stack = backward_stack(inputs, gradients);
  op.callBoxed(&stack);
  return {stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor(), stack[3].toTensor(),
          stack[4].toTensor()};
}

at::Tensor call_rng_state(const at::Tensor& like, const c10::SymInt& increment) {
  static const auto op = find("flash_attn::rng_state");
  torch::jit::Stack stack{like, increment};
  op.callBoxed(&stack);
  return stack[0].toTensor();
}

at::Tensor call_weights(const WeightsInputs& inputs) {
  static const auto op = find("flash_attn::attention_weights");
  torch::jit::Stack stack;
  push(stack, inputs);
  op.callBoxed(&stack);
  return stack[0].toTensor();
}

WeightsGradients call_weights_bwd(const at::Tensor& dweights, const WeightsInputs& inputs) {
  static const auto op = find("flash_attn::_attention_weights_bwd");
  torch::jit::Stack stack;
  push(stack, dweights);
  push(stack, inputs);
  op.callBoxed(&stack);
  return {stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor(), stack[3].toTensor()};
}

}  // namespace flash::ops
