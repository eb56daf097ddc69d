// SPDX-License-Identifier: BSD-3-Clause
// The arguments of the operators. Kernels are registered boxed, so the order in which a schema of
// library.cpp lists its arguments is read here, and nowhere else.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace flash::ops {

/// INPUTS of library.cpp. Dense: q (B, H, L, E), k (B, Hk, S, E), v (B, Hk, S, Ev); packed, with
/// cu_seqlens: (T, H, E) and so on. Optional tensors that are absent are undefined.
struct Inputs {
  at::Tensor q, k, v;
  at::Tensor bias, mask;  ///< 4-D, each dim 1 or that of (B, H, L, S); mask bool, true keeps
  at::Tensor alibi_slopes, sink;                                ///< (H) or (B, H); (H)
  at::Tensor cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k;  ///< (B + 1); (B)
  at::Tensor rng_state;                                         ///< int64 (seed, offset)
  c10::SymInt max_seqlen_q = 0, max_seqlen_k = 0;               ///< packed; 0: unknown
  bool bottom_right = false;
  std::optional<c10::SymInt> window_left, window_right;
  c10::SymInt prefix = 0;
  double scale = 1, softcap = 0, dropout_p = 0;

  bool packed() const { return cu_seqlens_q.defined(); }
  bool ragged() const { return packed() || seqused_q.defined() || seqused_k.defined(); }
};

/// Arguments of attention_joint: k and v, or without a q of its own q, k and v, are parts of one
/// tensor, (B, S, 2 or 3, H, E) or packed (T, 2 or 3, H, E), as one projection makes them. Its
/// gradient is one tensor as well, so that nobody has to gather it.
struct JointInputs {
  at::Tensor q, joint;  ///< q (B, H, L, E) or packed (T, H, E)
  Inputs inputs;        ///< its q, k and v are views of the two

  bool joins_q() const { return !q.defined(); }
};
/// (q, k, v) of such a tensor as the operators take them, q undefined if it has only two parts.
std::array<at::Tensor, 3> parts_of(const at::Tensor& joint, bool joins_q);

/// Arguments of attention_weights: q and k, the lse that attention returned, and the mask.
struct WeightsInputs {
  Inputs inputs;  ///< v, sink and the packed members are absent
  at::Tensor lse;
  bool average = true;
};

/// What _bwd and _attention_weights_bwd get beyond their inputs.
struct Gradients {
  at::Tensor dout, dlse;  ///< undefined: zero
  at::Tensor out, lse;
  bool deterministic = false;
  std::array<bool, 6> needs{};  ///< dq, dk, dv, dbias, dslopes, dsink
};

/// Walks over the arguments of one call.
class Arguments {
 public:
  explicit Arguments(c10::ArrayRef<c10::IValue> values) : values_(values) {}

  at::Tensor tensor() {
    const c10::IValue& value = next();
    return value.isNone() ? at::Tensor() : value.toTensor();
  }
  c10::SymInt size() { return next().toSymInt(); }
  std::optional<c10::SymInt> optional_size() {
    const c10::IValue& value = next();
    return value.isNone() ? std::nullopt : std::optional(value.toSymInt());
  }
  bool flag() { return next().toBool(); }
  double number() { return next().toDouble(); }
  std::string text() { return next().toStringRef(); }
  Inputs inputs();
  JointInputs joint_inputs();
  WeightsInputs weights_inputs();
  std::array<bool, 6> needs();
  /// The arguments of a backward operator, whose inputs `read` reads.
  template <class AnyInputs>
  std::pair<AnyInputs, Gradients> backward(AnyInputs (Arguments::*read)()) {
    Gradients gradients;
    gradients.dout = tensor();
    gradients.dlse = tensor();
    AnyInputs inputs = (this->*read)();
    gradients.out = tensor();
    gradients.lse = tensor();
    gradients.deterministic = flag();
    gradients.needs = needs();
    return {inputs, gradients};
  }

 private:
  const c10::IValue& next() { return values_[position_++]; }
  void read_options(Inputs& in);  ///< all that follows q, k and v

  c10::ArrayRef<c10::IValue> values_;
  size_t position_ = 0;
};

void push(torch::jit::Stack& stack, const at::Tensor& tensor);  ///< None where undefined
void push(torch::jit::Stack& stack, const Inputs& inputs);
void push(torch::jit::Stack& stack, const JointInputs& inputs);
void push(torch::jit::Stack& stack, const WeightsInputs& inputs);

/// A kernel `Results f(Arguments)` as the dispatcher calls it; Results is a tensor or a tuple.
template <auto kKernel>
void boxed(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size();
  auto results = kKernel(Arguments(torch::jit::last(*stack, count)));
  torch::jit::drop(*stack, count);
  if constexpr (requires { std::get<0>(results); }) {
    std::apply([&](auto&... result) { (stack->emplace_back(std::move(result)), ...); }, results);
  } else {
    stack->emplace_back(std::move(results));
  }
}
template <auto kKernel>
torch::CppFunction kernel() {
  return torch::CppFunction::makeFromBoxedFunction<&boxed<kKernel>>();
}

// The raw operators, called through the dispatcher.
using OutAndLse = std::tuple<at::Tensor, at::Tensor>;
using InputGradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
/// dq, djoint, dbias, dslopes, dsink
using JointGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using WeightsGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

OutAndLse call_attention(const Inputs& inputs, bool deterministic);
OutAndLse call_fwd(const Inputs& inputs);
InputGradients call_bwd(const Inputs& inputs, const Gradients& gradients);
JointGradients call_bwd_joint(const JointInputs& inputs, const Gradients& gradients);
at::Tensor call_rng_state(const at::Tensor& like, const c10::SymInt& increment);
at::Tensor call_weights(const WeightsInputs& inputs);
WeightsGradients call_weights_bwd(const at::Tensor& dweights, const WeightsInputs& inputs);

}  // namespace flash::ops
