// SPDX-License-Identifier: BSD-3-Clause
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "ops/checks.h"
#include "ops/compute.h"
#include "ops/make_params.h"
#include "ops/shapes.h"
#include "ops/workers.h"

namespace flash::ops {

namespace {

std::array<at::Tensor*, 6> members(InputGradients& g) {
  return {&std::get<0>(g), &std::get<1>(g), &std::get<2>(g),
          &std::get<3>(g), &std::get<4>(g), &std::get<5>(g)};
}

/// Rows without a key have out = 0 and lse = sink, so only the sink has a gradient.
void fill_without_keys(const Inputs& in, const Gradients& gradients, InputGradients& results) {
  for (at::Tensor* result : members(results)) result->zero_();
  at::Tensor& dsink = std::get<5>(results);
  if (dsink.numel() == 0 || !gradients.dlse.defined()) return;
  const at::Tensor dlse =
      at::where(gradients.lse.isinf(), at::zeros({}, gradients.lse.options()), gradients.dlse);
  dsink.copy_(in.packed() ? dlse.sum(1) : dlse.sum(at::IntArrayRef({0, 2})));
}

/// Output of the kernel for a result: itself, or a tensor in the accumulation type (slopes, sink)
/// or with the column that `with_columns` added.
at::Tensor target_of(const at::Tensor& result, const at::Tensor& input, bool wanted) {
  if (!wanted || !input.defined()) return result;
  if (result.sizes() == input.sizes() && result.scalar_type() == input.scalar_type()) return result;
  return at::empty(input.sizes(), input.options().memory_format(at::MemoryFormat::Contiguous));
}

/// dO as every kernel takes it. Autograd may hand it expanded (out.sum()) or sliced; tensor copies
/// of whole rows (TMA) want strides and an address of 16 bytes, and no stride of 0.
at::Tensor with_dense_rows(const at::Tensor& dout) {
  const int64_t bytes = dout.element_size(), row_bytes = dout.size(-1) * bytes;
  const bool wants_alignment = row_bytes % 16 == 0;
  bool dense = !wants_alignment || reinterpret_cast<uintptr_t>(dout.const_data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim + 1 < dout.dim(); ++dim) {
    if (dout.size(dim) == 1) continue;
    dense = dense && dout.stride(dim) != 0;
    dense = dense && (!wants_alignment || dout.stride(dim) * bytes % 16 == 0);
  }
  return dense ? with_contiguous_rows(dout) : dout.contiguous();
}

/// dout, out, lse and dlse as kernels want them.
Gradients normalised(const Inputs& in, const Gradients& gradients) {
  Gradients g = gradients;
  auto sizes = in.q.sizes().vec();
  sizes.back() = in.v.size(-1);
  const bool no_columns = gradients.out.size(-1) == 0;
  const bool no_dout = no_columns || !g.dout.defined();
  g.dout = no_dout ? at::zeros(sizes, in.q.options()) : with_dense_rows(g.dout);
  g.out = no_columns ? g.dout : with_contiguous_rows(g.out);
  g.lse = with_contiguous_rows(g.lse);
  g.dlse = with_contiguous_rows(g.dlse);
  g.deterministic = g.deterministic || at::globalContext().deterministicAlgorithms();
  return g;
}

void run(const Inputs& in, const Gradients& gradients, const InputGradients& targets,
         const Device& device) {
  const BackwardParams p = backward_params(in, gradients, targets);
  const Backend& backend = choose_backend(device, p, /*backward=*/true);
  const Workspace workspace(backend.backward_workspace_bytes(p, device.num_workers()),
                            in.q.device());
  backend.backward(p, {workspace.data(), device.stream, device.workers});
}

/// The gradients of the call into `results`, which have the sizes of the inputs, or no elements.
void backward_into(InputGradients& results, const Inputs& raw, const Gradients& gradients,
                   const Device& device) {
  const bool no_gradient = !gradients.dout.defined() && !gradients.dlse.defined();
  const bool no_sequence = raw.packed() && raw.cu_seqlens_q.numel() == 1;
  if (no_gradient || no_sequence || gradients.lse.numel() == 0) {
    for (at::Tensor* result : members(results)) result->zero_();
    return;
  }
  const Inputs in = normalised(with_columns(raw));
  if (in.k.numel() == 0) {
    fill_without_keys(in, gradients, results);
    return;
  }
  InputGradients targets = results;
  const std::array<const at::Tensor*, 6> inputs{&in.q,   &in.k, &in.v, &in.bias, &in.alibi_slopes,
                                                &in.sink};
  for (size_t i = 0; i < inputs.size(); ++i) {
    at::Tensor& target = *members(targets)[i];
    target = target_of(target, *inputs[i], gradients.needs[i]);
    const bool is_bias = i == 3;  // blocks that a mask drops whole are not visited
    const bool is_filled = i < 4 && device.fills_unowned_rows();
    if ((is_bias || in.ragged()) && !is_filled) target.zero_();
  }
  run(in, normalised(in, gradients), targets, device);
  for (size_t i = 0; i < inputs.size(); ++i) {
    at::Tensor &result = *members(results)[i], &target = *members(targets)[i];
    if (result.numel() != 0 && !result.is_same(target)) result.copy_(target);
  }
}

void check(const Inputs& raw, const Gradients& gradients, const Device& device) {
  check_inputs(raw);
  check_gradients(raw, gradients);
  if (device.type == at::kCPU) check_lengths(raw);
}

}  // namespace

InputGradients backward(const Inputs& raw, const Gradients& gradients, const Device& device) {
  check(raw, gradients, device);
  InputGradients results = empty_gradients(raw, gradients.needs);
  backward_into(results, raw, gradients, device);
  return results;
}

JointGradients backward(const JointInputs& raw, const Gradients& gradients, const Device& device) {
  check(raw.inputs, gradients, device);
  Gradients g = gradients;
  if (raw.joins_q()) g.needs[0] = g.needs[1];
  g.needs[2] = g.needs[1];
  const JointGradients results = empty_gradients(raw, g.needs);
  const auto& [own_dq, djoint, dbias, dslopes, dsink] = results;
  const auto [dq, dk, dv] = g.needs[1] ? parts_of(djoint, raw.joins_q())
                                       : std::array<at::Tensor, 3>{djoint, djoint, djoint};
  InputGradients separate{raw.joins_q() ? dq : own_dq, dk, dv, dbias, dslopes, dsink};
  backward_into(separate, raw.inputs, g, device);
  return results;
}

}  // namespace flash::ops
