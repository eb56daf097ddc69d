// SPDX-License-Identifier: BSD-3-Clause
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "ops/checks.h"
#include "ops/compute.h"
#include "ops/make_params.h"
#include "ops/shapes.h"
#include "ops/workers.h"

namespace flash::ops {

namespace {

at::Tensor zero_column(const at::Tensor& t) {
  auto sizes = t.sizes().vec();
  sizes.back() = 1;
  return at::zeros({1}, t.options()).expand(sizes);
}

/// Rows without a key: out 0, lse -inf, or the sink where there is one.
void fill_without_keys(const Inputs& in, OutAndLse& outputs) {
  auto& [out, lse] = outputs;
  out.zero_();
  if (in.sink.defined() && !in.ragged()) {
    lse.copy_(in.sink.view({1, -1, 1}).expand(lse.sizes()));
  } else {
    lse.fill_(-std::numeric_limits<double>::infinity());
  }
}

void run(const Inputs& in, OutAndLse& outputs, const Device& device) {
  const ForwardParams p = forward_params(in, outputs);
  const Backend& backend = choose_backend(device, p, /*backward=*/false);
  const Workspace workspace(backend.forward_workspace_bytes(p, device.num_workers()),
                            in.q.device());
  backend.forward(p, {workspace.data(), device.stream, device.workers});
}

}  // namespace

Inputs with_columns(const Inputs& in) {
  Inputs out = in;
  if (in.q.size(-1) == 0) {
    out.q = zero_column(in.q);
    out.k = zero_column(in.k);
  }
  if (in.v.defined() && in.v.size(-1) == 0) out.v = zero_column(in.v);
  return out;
}

OutAndLse forward(const Inputs& raw, const Device& device) {
  check_inputs(raw);
  if (device.type == at::kCPU) check_lengths(raw);
  OutAndLse results = empty_outputs(raw);
  if (std::get<1>(results).numel() == 0) return results;

  const Inputs in = normalised(with_columns(raw));
  OutAndLse outputs = results;
  if (raw.v.size(-1) == 0) std::get<0>(outputs) = std::get<0>(empty_outputs(in));
  const bool no_keys = in.k.numel() == 0;
  const bool nothing_to_run = no_keys && !(in.packed() && in.sink.defined() && in.k.size(1) > 0);
  const bool no_sequence = in.packed() && in.cu_seqlens_q.numel() == 1;
  const bool runs = !nothing_to_run && !no_sequence;
  if (no_keys || (in.ragged() && !(runs && device.fills_unowned_rows())))
    fill_without_keys(in, outputs);
  if (runs) run(in, outputs, device);
  return results;
}

std::vector<std::string> reasons_against(const Inputs& raw, const Device& device,
                                         const std::string& name, bool backward) {
  check_inputs(raw);
  const Inputs in = normalised(with_columns(raw));
  const ForwardParams p = forward_params(in, empty_outputs(in));
  return why_unsupported(device.candidates, name, p, backward);
}

}  // namespace flash::ops
