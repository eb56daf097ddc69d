// SPDX-License-Identifier: BSD-3-Clause
// torch.nn.functional.scaled_dot_product_attention: what torch means by ranks, broadcasting,
// grouped heads and masks, turned into strided 4-D views.
#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>

#include <cmath>
#include <numeric>

#include "ops/checks.h"
#include "ops/inputs.h"

namespace flash::ops {

namespace {

using SymSizes = c10::SymDimVector;
using OptionalTensor = std::optional<at::Tensor>;
using FourDimensional =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, OptionalTensor, OptionalTensor>;

/// Dimensions before the last `tail`.
c10::SymIntArrayRef leading(const at::Tensor& t, int64_t tail) {
  return t.sym_sizes().slice(0, t.dim() - tail);
}

SymSizes joined(c10::SymIntArrayRef front, std::initializer_list<c10::SymInt> back) {
  SymSizes sizes(front.begin(), front.end());
  sizes.insert(sizes.end(), back.begin(), back.end());
  return sizes;
}

c10::SymInt product(c10::SymIntArrayRef sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), c10::SymInt(1),
                         [](const c10::SymInt& a, const c10::SymInt& b) { return a * b; });
}

/// (batch..., h, rows, columns) -> (B, h, rows, columns), with the batch dimensions broadcast to
/// `batch`. A copy only where broadcast and plain batch dimensions cannot be one stride.
at::Tensor flatten_batch(const at::Tensor& t, c10::SymIntArrayRef batch) {
  const at::Tensor with_head = t.dim() == 2 ? t.unsqueeze(0) : t;
  const SymSizes inner(with_head.sym_sizes().end() - 3, with_head.sym_sizes().end());
  const SymSizes full = joined(batch, {inner[0], inner[1], inner[2]});
  at::Tensor expanded = with_head.sym_sizes() == c10::SymIntArrayRef(full)
                            ? with_head
                            : with_head.expand_symint(full);
  if (batch.size() == 1) return expanded;
  if (batch.empty()) return expanded.unsqueeze(0);
  return expanded.reshape_symint(joined({}, {product(batch), inner[0], inner[1], inner[2]}));
}

/// Repeats each head of (B, h, S, E) so that there are `heads`; a view for one head.
at::Tensor repeat_heads(const at::Tensor& t, const c10::SymInt& heads) {
  const auto sizes = t.sym_sizes();
  if (sizes[1] == heads) return t;
  if (sizes[1] == 1) return t.expand_symint({sizes[0], heads, sizes[2], sizes[3]});
  const at::Tensor repeated =
      t.unsqueeze(2).expand_symint({sizes[0], sizes[1], heads / sizes[1], sizes[2], sizes[3]});
  return repeated.reshape_symint({sizes[0], heads, sizes[2], sizes[3]});
}

/// Key and value with one common number of heads. Where they differ, the least common multiple:
/// both divide the query's heads, so it does too.
void equalise_heads(at::Tensor& k, at::Tensor& v) {
  if (k.sym_size(1) == v.sym_size(1)) return;
  const int64_t heads_k = k.sym_size(1).guard_int(__FILE__, __LINE__);
  const int64_t heads_v = v.sym_size(1).guard_int(__FILE__, __LINE__);
  const c10::SymInt common = std::lcm(heads_k, heads_v);
  k = repeat_heads(k, common);
  v = repeat_heads(v, common);
}

/// A mask that broadcasts to (batch..., H, L, S) as (1 or B, 1 or H, 1 or L, 1 or S).
at::Tensor flatten_mask(const at::Tensor& mask, c10::SymIntArrayRef batch) {
  const int64_t rank = int64_t(batch.size()) + 3;
  at::Tensor m = mask;
  while (m.dim() < rank) m = m.unsqueeze(0);
  if (batch.size() == 1) return m;
  if (batch.empty()) return m.unsqueeze(0);
  const auto sizes = m.sym_sizes();
  const SymSizes inner(sizes.end() - 3, sizes.end());
  const c10::SymInt own_batch = product(sizes.slice(0, batch.size()));
  if (own_batch == 1)
    return m.reshape_symint(joined({}, {c10::SymInt(1), inner[0], inner[1], inner[2]}));
  return m.expand_symint(joined(batch, {inner[0], inner[1], inner[2]}))
      .reshape_symint(joined({}, {product(batch), inner[0], inner[1], inner[2]}));
}

/// Sizes (batch..., H) of the output before (L, Ev); H is absent for 2-D inputs.
SymSizes output_leading(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        bool enable_gqa) {
  if (!enable_gqa)
    return at::infer_size_symdimvector(
        at::infer_size_symdimvector(leading(query, 2), leading(key, 2)), leading(value, 2));
  const c10::SymInt heads = query.sym_size(-3);
  check_gqa(heads, key.sym_size(-3), value.sym_size(-3));
  const SymSizes batch = at::infer_size_symdimvector(
      at::infer_size_symdimvector(leading(query, 3), leading(key, 3)), leading(value, 3));
  return joined(batch, {heads});
}

struct Views {
  at::Tensor q, k, v, bias, mask;
  SymSizes output;  ///< (batch..., H, L, Ev)
};

Views views_of(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
               const OptionalTensor& attn_mask, bool is_causal, bool enable_gqa) {
  const at::Tensor mask = attn_mask.value_or(at::Tensor());
  check_sdpa(query, key, value, mask, is_causal);
  const SymSizes lead = output_leading(query, key, value, enable_gqa);
  const c10::SymIntArrayRef batch =
      c10::SymIntArrayRef(lead).slice(0, lead.empty() ? 0 : lead.size() - 1);

  Views views;
  views.q = flatten_batch(query, batch);
  if (!lead.empty()) views.q = repeat_heads(views.q, lead.back());
  views.k = flatten_batch(key, batch);
  views.v = flatten_batch(value, batch);
  equalise_heads(views.k, views.v);
  views.output = joined(lead, {query.sym_size(-2), value.sym_size(-1)});
  if (mask.defined()) {
    check_mask_broadcasts(mask, joined(lead, {query.sym_size(-2), key.sym_size(-2)}));
    (mask.scalar_type() == at::kBool ? views.mask : views.bias) = flatten_mask(mask, batch);
  }
  return views;
}

OptionalTensor optional(const at::Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

FourDimensional as_4d(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                      const OptionalTensor& attn_mask, bool is_causal, bool enable_gqa) {
  const Views views = views_of(query, key, value, attn_mask, is_causal, enable_gqa);
  return {views.q, views.k, views.v, optional(views.bias), optional(views.mask)};
}

at::Tensor sdpa(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                std::optional<double> scale, bool enable_gqa) {
  const Views views = views_of(query, key, value, attn_mask, is_causal, enable_gqa);
  check_dropout(dropout_p);
  Inputs in;
  in.q = views.q;
  in.k = views.k;
  in.v = views.v;
  in.bias = views.bias;
  in.mask = views.mask;
  if (is_causal) in.window_right = 0;
  const int64_t head_dim = query.sym_size(-1).guard_int(__FILE__, __LINE__);
  in.scale = scale.value_or(head_dim > 0 ? 1 / std::sqrt(double(head_dim)) : 1.0);
  in.dropout_p = dropout_p;
  if (dropout_p > 0) in.rng_state = call_rng_state(in.q, in.q.sym_size(0) * in.q.sym_size(1));
  const at::Tensor out = std::get<0>(call_attention(in, /*deterministic=*/false));
  return views.output.size() == 4 ? out : out.view_symint(views.output);
}

}  // namespace

TORCH_LIBRARY_IMPL(flash_attn, CompositeImplicitAutograd, m) {
  m.impl("sdpa", &sdpa);
  m.impl("_as_4d", &as_4d);
}
// vmap does not take composite operators apart by itself.
TORCH_LIBRARY_IMPL(flash_attn, FuncTorchBatchedDecomposition, m) { m.impl("_as_4d", &as_4d); }

}  // namespace flash::ops
