// SPDX-License-Identifier: BSD-3-Clause
// The differentiable operators. Both outputs have gradients: with delta = rowsum(dO o O) - dLSE,
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
// The two operators differ in what their inputs are; attention_joint has dq, dk and dv in one
// tensor.
std::array<at::Tensor, 6> differentiable(const Inputs& in) {
  return {in.q, in.k, in.v, in.bias, in.alibi_slopes, in.sink};
}
std::array<at::Tensor, 5> differentiable(const JointInputs& all) {
  return {all.q, all.joint, all.inputs.bias, all.inputs.alibi_slopes, all.inputs.sink};
}
constexpr int num_input_tensors(const Inputs&) { return 12; }  ///< that the stack begins with
constexpr int num_input_tensors(const JointInputs&) { return 11; }
OutAndLse call_forward(const Inputs& in) { return call_fwd(in); }
OutAndLse call_forward(const JointInputs& all) { return call_fwd(all.inputs); }
Inputs read(Arguments arguments, const Inputs&) { return arguments.inputs(); }
JointInputs read(Arguments arguments, const JointInputs&) { return arguments.joint_inputs(); }

/// Gradients in the order of `differentiable`, of which `needs` tells the wanted ones.
std::array<at::Tensor, 6> call_backward(const Inputs& in, Gradients& gradients,
                                        const std::array<bool, 6>& needs) {
  gradients.needs = needs;
  const auto [dq, dk, dv, dbias, dslopes, dsink] = call_bwd(in, gradients);
  return {dq, dk, dv, dbias, dslopes, dsink};
}
std::array<at::Tensor, 5> call_backward(const JointInputs& all, Gradients& gradients,
                                        const std::array<bool, 5>& needs) {
  gradients.needs = {needs[0], needs[1], needs[1], needs[2], needs[3], needs[4]};
  const auto [dq, djoint, dbias, dslopes, dsink] = call_bwd_joint(all, gradients);
  return {dq, djoint, dbias, dslopes, dsink};
}

template <class AnyInputs>
class AttentionFunction : public torch::autograd::Function<AttentionFunction<AnyInputs>> {
 public:
  static constexpr bool is_traceable = true;

  /// The differentiable tensors that are defined are an argument so that autograd sees them; `in`
  /// holds them too.
  static variable_list forward(AutogradContext* ctx, at::TensorList /*differentiable*/,
                               const AnyInputs& in, bool deterministic) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [out, lse] = call_forward(in);
    ctx->set_materialize_grads(false);
    torch::jit::Stack stack;
    push(stack, in);
    const int num_tensors = num_input_tensors(in);
    variable_list saved;
    for (int i = 0; i < num_tensors; ++i)
      saved.push_back(stack[i].isNone() ? at::Tensor() : stack[i].toTensor());
    saved.push_back(out);
    saved.push_back(lse);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["numbers"] = c10::ivalue::Tuple::create(
        std::vector<c10::IValue>(stack.begin() + num_tensors, stack.end()));
    ctx->saved_data["deterministic"] = deterministic;
    ctx->saved_data["backend"] = named_backend();
    return {out, lse};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    torch::jit::Stack stack;
    const int num_tensors = num_input_tensors(AnyInputs{});
    for (int i = 0; i < num_tensors; ++i) push(stack, saved[i]);
    for (const c10::IValue& number : ctx->saved_data["numbers"].toTupleRef().elements())
      stack.push_back(number);
    const AnyInputs in = read(Arguments(stack), AnyInputs{});

    auto wanted = differentiable(in);
    std::array<bool, std::tuple_size_v<decltype(wanted)>> needs{};
    size_t num_defined = 0;  // needs_input_grad counts these
    for (size_t i = 0; i < needs.size(); ++i)
      if (wanted[i].defined()) needs[i] = ctx->needs_input_grad(num_defined++);
    variable_list results(num_defined + 2);  // the arguments of forward
    if (!grads[0].defined() && !grads[1].defined()) return results;

    Gradients gradients{.dout = grads[0],
                        .dlse = grads[1],
                        .out = saved[num_tensors],
                        .lse = saved[num_tensors + 1],
                        .deterministic = ctx->saved_data["deterministic"].toBool()};
    const std::string backend = ctx->saved_data["backend"].toStringRef();
    const BackendScope scope(backend);
    const auto computed = call_backward(in, gradients, needs);
    for (size_t i = 0, place = 0; i < needs.size(); ++i) {
      if (!wanted[i].defined()) continue;
      if (needs[i]) results[place] = computed[i];
      ++place;
    }
    return results;
  }
};

template <class AnyInputs>
OutAndLse apply(const AnyInputs& in, bool deterministic) {
  variable_list defined;
  bool has_gradient = false;
  for (const at::Tensor& t : differentiable(in)) {
    if (!t.defined()) continue;
    defined.push_back(t);
    has_gradient |= at::GradMode::is_enabled() && t.requires_grad();
    has_gradient |= t._fw_grad(/*level=*/0).defined();  // Function says that it has no jvp
  }
  if (!has_gradient) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_forward(in);
  }
  const variable_list results =
      AttentionFunction<AnyInputs>::apply(at::TensorList(defined), in, deterministic);
  return {results[0], results[1]};
}

OutAndLse attention_autograd(Arguments arguments) {
  const Inputs in = arguments.inputs();
  return apply(in, arguments.flag());
}
OutAndLse attention_joint_autograd(Arguments arguments) {
  const JointInputs all = arguments.joint_inputs();
  return apply(all, arguments.flag());
}

OutAndLse attention_below_autograd(Arguments arguments) { return call_fwd(arguments.inputs()); }
OutAndLse attention_joint_below_autograd(Arguments arguments) {
  return call_fwd(arguments.joint_inputs().inputs);
}

}  // namespace

TORCH_LIBRARY_IMPL(flash_attn, Autograd, m) {
  m.impl("attention", kernel<&attention_autograd>());
  m.impl("attention_joint", kernel<&attention_joint_autograd>());
  // A derivative of these would be a double backward or a forward without its backward: torch's
  // RuntimeError names the operator.
  m.impl("_fwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("_bwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("_bwd_joint", torch::autograd::autogradNotImplementedFallback());
  m.impl("_attention_weights_bwd", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(flash_attn, CompositeExplicitAutograd, m) {
  m.impl("attention", kernel<&attention_below_autograd>());
  m.impl("attention_joint", kernel<&attention_joint_below_autograd>());
}

}  // namespace flash::ops
