// SPDX-License-Identifier: BSD-3-Clause
// attention_weights: the weights that scaled dot product attention never stores, from q, k and lse.
#include <torch/csrc/autograd/custom_function.h>

#include "ops/checks.h"
#include "ops/compute.h"
#include "ops/make_params.h"
#include "ops/shapes.h"
#include "ops/workers.h"

namespace flash::ops {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

WeightsInputs prepared(const WeightsInputs& raw) {
  WeightsInputs all = raw;
  all.inputs = with_columns(raw.inputs);
  all.inputs.v = all.inputs.k;
  all.inputs = normalised(all.inputs);
  all.lse = with_contiguous_rows(raw.lse);
  return all;
}

class WeightsFunction : public torch::autograd::Function<WeightsFunction> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& lse, const std::optional<at::Tensor>& bias,
                            const WeightsInputs& all) {
    (void)q, (void)k, (void)lse, (void)bias;  // listed so that autograd sees them; `all` has them
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->set_materialize_grads(false);
    const Inputs& in = all.inputs;
    ctx->save_for_backward({in.q, in.k, all.lse, in.bias, in.mask, in.alibi_slopes, in.rng_state});
    torch::jit::Stack numbers;
    push(numbers, all);
    ctx->saved_data["numbers"] = c10::ivalue::Tuple::create(
        std::vector<c10::IValue>(numbers.begin() + kTensors, numbers.end()));
    ctx->saved_data["backend"] = named_backend();
    return call_weights(all);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (!grads[0].defined()) return variable_list(5);
    torch::jit::Stack stack;
    for (const at::Tensor& saved : ctx->get_saved_variables()) push(stack, saved);
    for (const c10::IValue& number : ctx->saved_data["numbers"].toTupleRef().elements())
      stack.push_back(number);
    const WeightsInputs all = Arguments(stack).weights_inputs();
    const std::string backend = ctx->saved_data["backend"].toStringRef();
    const BackendScope scope(backend);
    const auto [dq, dk, dlse, dbias] = call_weights_bwd(grads[0], all);
    return {dq, dk, dlse, all.inputs.bias.defined() ? dbias : at::Tensor(), at::Tensor()};
  }

 private:
  static constexpr int kTensors = 7;
};

at::Tensor weights_autograd(Arguments arguments) {
  const WeightsInputs all = arguments.weights_inputs();
  const Inputs& in = all.inputs;
  check_no_gradient("alibi_slopes of attention_weights", in.alibi_slopes);
  const auto bias = in.bias.defined() ? std::optional(in.bias) : std::nullopt;
  return WeightsFunction::apply(in.q, in.k, all.lse, bias, all);
}

}  // namespace

at::Tensor weights(const WeightsInputs& raw, const Device& device) {
  check_weights(raw);
  at::Tensor result = empty_weights(raw);
  if (result.numel() == 0) return result;
  const WeightsInputs all = prepared(raw);
  const WeightsParams p = weights_params(all, result);
  const Backend& backend = choose_backend(device, p, /*backward=*/false);
  backend.weights(p, {nullptr, device.stream, device.workers});
  return result;
}

WeightsGradients weights_backward(const at::Tensor& dweights, const WeightsInputs& raw,
                                  const Device& device) {
  check_weights(raw);
  check_weights_gradient(raw, dweights);
  WeightsGradients results = empty_weights_gradients(raw);
  auto& [dq, dk, dlse, dbias] = results;
  if (dweights.numel() == 0) {
    for (at::Tensor* result : {&dq, &dk, &dlse, &dbias}) result->zero_();
    return results;
  }
  const WeightsInputs all = prepared(raw);
  WeightsGradients targets = results;
  if (raw.inputs.q.size(-1) == 0)
    targets = {at::empty_like(all.inputs.q, at::MemoryFormat::Contiguous),
               at::empty_like(all.inputs.k, at::MemoryFormat::Contiguous), dlse, dbias};
  dbias.zero_();
  const at::Tensor dense = dweights.contiguous();
  const WeightsBackwardParams p = weights_backward_params(all, dense, targets);
  const Backend& backend = choose_backend(device, p, /*backward=*/true);
  const Workspace workspace(backend.weights_backward_workspace_bytes(p, device.num_workers()),
                            all.inputs.q.device());
  backend.weights_backward(p, {workspace.data(), device.stream, device.workers});
  return results;
}

TORCH_LIBRARY_IMPL(flash_attn, Autograd, m) {
  m.impl("attention_weights", kernel<&weights_autograd>());
}

}  // namespace flash::ops
