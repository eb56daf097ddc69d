// SPDX-License-Identifier: BSD-3-Clause
// The differentiable operator. Both outputs have gradients: with delta = rowsum(dO o O) - dLSE,
// dS = P o (dP - delta).
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops/backends.h"
#include "ops/inputs.h"

namespace flash::ops {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;

constexpr int kInputTensors = 12;  ///< that INPUTS begins with

OptionalTensor optional(const at::Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

class AttentionFunction : public torch::autograd::Function<AttentionFunction> {
 public:
  static constexpr bool is_traceable = true;
  static constexpr int kArguments = 8;

  /// The differentiable tensors are arguments so that autograd sees them; `in` holds them too.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& /*q*/,
                               const at::Tensor& /*k*/, const at::Tensor& /*v*/,
                               const OptionalTensor& /*bias*/,
                               const OptionalTensor& /*alibi_slopes*/,
                               const OptionalTensor& /*sink*/, const Inputs& in,
                               bool deterministic) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [out, lse] = call_fwd(in);
    ctx->set_materialize_grads(false);
    torch::jit::Stack stack;
    push(stack, in);
    variable_list saved;
    for (int i = 0; i < kInputTensors; ++i)
      saved.push_back(stack[i].isNone() ? at::Tensor() : stack[i].toTensor());
    saved.push_back(out);
    saved.push_back(lse);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["numbers"] = c10::ivalue::Tuple::create(
        std::vector<c10::IValue>(stack.begin() + kInputTensors, stack.end()));
    ctx->saved_data["deterministic"] = deterministic;
    ctx->saved_data["backend"] = named_backend();
    return {out, lse};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list results(kArguments);
    if (!grads[0].defined() && !grads[1].defined()) return results;
    const variable_list saved = ctx->get_saved_variables();
    torch::jit::Stack stack;
    for (int i = 0; i < kInputTensors; ++i) push(stack, saved[i]);
    for (const c10::IValue& number : ctx->saved_data["numbers"].toTupleRef().elements())
      stack.push_back(number);
    const Inputs in = Arguments(stack).inputs();
    const Gradients gradients{.dout = grads[0],
                              .dlse = grads[1],
                              .out = saved[kInputTensors],
                              .lse = saved[kInputTensors + 1],
                              .deterministic = ctx->saved_data["deterministic"].toBool(),
                              .needs = needs_of(ctx, in)};
    const std::string backend = ctx->saved_data["backend"].toStringRef();
    const BackendScope scope(backend);
    const auto [dq, dk, dv, dbias, dslopes, dsink] = call_bwd(in, gradients);
    const at::Tensor computed[6] = {dq, dk, dv, dbias, dslopes, dsink};
    for (int i = 0; i < 6; ++i)
      if (gradients.needs[i]) results[i] = computed[i];
    return results;
  }

 private:
  /// needs_input_grad counts the tensors that were defined.
  static std::array<bool, 6> needs_of(AutogradContext* ctx, const Inputs& in) {
    std::array<bool, 6> needs{};
    size_t edge = 0;
    const at::Tensor* inputs[6] = {&in.q, &in.k, &in.v, &in.bias, &in.alibi_slopes, &in.sink};
    for (int i = 0; i < 6; ++i)
      if (inputs[i]->defined()) needs[i] = ctx->needs_input_grad(edge++);
    return needs;
  }
};

bool has_gradient(const Inputs& in) {
  for (const at::Tensor* t : {&in.q, &in.k, &in.v, &in.bias, &in.alibi_slopes, &in.sink}) {
    if (!t->defined()) continue;
    if (at::GradMode::is_enabled() && t->requires_grad()) return true;
    if (t->_fw_grad(/*level=*/0).defined()) return true;  // Function says that it has no jvp
  }
  return false;
}

OutAndLse attention_autograd(Arguments arguments) {
  const Inputs in = arguments.inputs();
  const bool deterministic = arguments.flag();
  if (!has_gradient(in)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_fwd(in);
  }
  const variable_list results =
      AttentionFunction::apply(in.q, in.k, in.v, optional(in.bias), optional(in.alibi_slopes),
                               optional(in.sink), in, deterministic);
  return {results[0], results[1]};
}

OutAndLse attention_below_autograd(Arguments arguments) { return call_fwd(arguments.inputs()); }

}  // namespace

TORCH_LIBRARY_IMPL(flash_attn, Autograd, m) {
  m.impl("attention", kernel<&attention_autograd>());
  // A derivative of these would be a double backward or a forward without its backward: torch's
  // RuntimeError names the operator.
  m.impl("_fwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("_bwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("_attention_weights_bwd", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(flash_attn, CompositeExplicitAutograd, m) {
  m.impl("attention", kernel<&attention_below_autograd>());
}

}  // namespace flash::ops
