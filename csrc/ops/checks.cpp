// SPDX-License-Identifier: BSD-3-Clause
#include "ops/checks.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <cmath>

#include "attention/mask.h"
#include "ops/shapes.h"

namespace flash::ops {

namespace {

constexpr int64_t kMaxLength = IntervalMask::kUnbounded - 1;

bool is_supported(at::ScalarType type) {
  return type == at::kHalf || type == at::kBFloat16 || type == at::kFloat || type == at::kDouble;
}

void check_dtype(const at::Tensor& query) {
  const at::ScalarType type = query.scalar_type();
  const bool exotic = at::isComplexType(type) || at::isFloat8Type(type);
  TORCH_CHECK_NOT_IMPLEMENTED(!exotic, "flash_attn: expected query, key and value of dtype ",
                              "float16, bfloat16, float32 or float64, got ", type);
  TORCH_CHECK(is_supported(type), "flash_attn: expected query, key and value of dtype float16, ",
              "bfloat16, float32 or float64, got ", type);
}

void check_same_dtype_and_device(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  TORCH_CHECK(q.dtype() == k.dtype() && q.dtype() == v.dtype(),
              "Expected query, key, and value to have the same dtype, but got query.dtype: ",
              q.dtype(), " key.dtype: ", k.dtype(), " and value.dtype: ", v.dtype(), " instead.");
  TORCH_CHECK(q.device() == k.device() && q.device() == v.device(),
              "Expected query, key, and value to have the same device type, but got query.device: ",
              q.device(), " key.device: ", k.device(), " and value.device: ", v.device(),
              " instead.");
}

void check_device(const char* name, const at::Tensor& t, const at::Tensor& q) {
  TORCH_CHECK(t.device() == q.device(), "flash_attn: expected ", name, " on the device of query, ",
              q.device(), ", got ", t.device());
}

void check_rank(const char* name, const at::Tensor& t, int64_t rank, const char* meaning) {
  TORCH_CHECK(t.dim() == rank, "flash_attn: expected ", name, " of ", rank, " dimensions ", meaning,
              ", got ", t.dim());
}

void check_size(const char* what, const c10::SymInt& size, const char* of,
                const c10::SymInt& wanted) {
  TORCH_SYM_CHECK(size.sym_eq(wanted), "flash_attn: expected ", what, " to equal ", of, ", ",
                  wanted, ", got ", size);
}

void check_float(const char* name, const at::Tensor& t) {
  TORCH_CHECK(at::isFloatingType(t.scalar_type()), "flash_attn: expected ", name,
              " of a floating-point dtype, got ", t.scalar_type());
}

/// bias or mask over (B, H, L, S), each dim 1 or full.
void check_pairs(const char* name, const at::Tensor& t, const Shape& s, const at::Tensor& q) {
  check_device(name, t, q);
  check_rank(name, t, 4, "(batch, heads, seqlen_q, seqlen_k)");
  const c10::SymInt full[4] = {s.batch, s.heads, s.bound_q, s.bound_k};
  for (int dim = 0; dim < 4; ++dim)
    TORCH_SYM_CHECK(t.sym_size(dim).sym_eq(1).sym_or(t.sym_size(dim).sym_eq(full[dim])),
                    "flash_attn: expected ", name, " of size 1 or ", full[dim], " in dimension ",
                    dim, ", got ", t.sym_size(dim));
}

void check_bias_and_mask(const Inputs& in, const Shape& s) {
  if (in.bias.defined()) {
    check_pairs("bias", in.bias, s, in.q);
    const at::ScalarType type = in.bias.scalar_type();
    TORCH_CHECK(type == in.q.scalar_type() || type == at::kFloat,
                "flash_attn: expected bias of dtype ", in.q.scalar_type(), " or Float, got ", type);
  }
  if (in.mask.defined()) {
    check_pairs("mask", in.mask, s, in.q);
    TORCH_CHECK(in.mask.scalar_type() == at::kBool, "flash_attn: expected mask of dtype bool, got ",
                in.mask.scalar_type());
  }
}

void check_head_vectors(const Inputs& in, const Shape& s) {
  if (in.alibi_slopes.defined()) {
    const at::Tensor& slopes = in.alibi_slopes;
    check_device("alibi_slopes", slopes, in.q);
    check_float("alibi_slopes", slopes);
    TORCH_CHECK(slopes.dim() == 1 || slopes.dim() == 2,
                "flash_attn: expected alibi_slopes of shape (heads) or (batch, heads), got ",
                slopes.sym_sizes());
    check_size("the last dimension of alibi_slopes", slopes.sym_size(-1), "the heads of query",
               s.heads);
    if (slopes.dim() == 2)
      check_size("the first dimension of alibi_slopes", slopes.sym_size(0), "the batch size",
                 s.batch);
  }
  if (in.sink.defined()) {
    check_device("sink", in.sink, in.q);
    check_float("sink", in.sink);
    check_rank("sink", in.sink, 1, "(heads)");
    check_size("the size of sink", in.sink.sym_size(0), "the heads of query", s.heads);
  }
}

void check_lengths_tensor(const char* name, const at::Tensor& t, const at::Tensor& q) {
  check_device(name, t, q);
  check_rank(name, t, 1, "");
  TORCH_CHECK(t.scalar_type() == at::kInt || t.scalar_type() == at::kLong, "flash_attn: expected ",
              name, " of dtype int32 or int64, got ", t.scalar_type());
}

void check_packing(const Inputs& in) {
  TORCH_CHECK(in.cu_seqlens_q.defined() == in.cu_seqlens_k.defined(),
              "flash_attn: expected cu_seqlens_q and cu_seqlens_k together, got only ",
              in.cu_seqlens_q.defined() ? "cu_seqlens_q" : "cu_seqlens_k");
  if (!in.packed()) return;
  check_lengths_tensor("cu_seqlens_q", in.cu_seqlens_q, in.q);
  check_lengths_tensor("cu_seqlens_k", in.cu_seqlens_k, in.q);
  TORCH_SYM_CHECK(in.cu_seqlens_q.sym_size(0).sym_ge(1),
                  "flash_attn: expected cu_seqlens_q of batch + 1 entries, got none");
  check_size("the size of cu_seqlens_k", in.cu_seqlens_k.sym_size(0), "that of cu_seqlens_q",
             in.cu_seqlens_q.sym_size(0));
  TORCH_SYM_CHECK(in.max_seqlen_q.sym_ge(0).sym_and(in.max_seqlen_k.sym_ge(0)),
                  "flash_attn: expected max_seqlen_q and max_seqlen_k >= 0, got ", in.max_seqlen_q,
                  " and ", in.max_seqlen_k);
}

void check_seqused(const Inputs& in, const Shape& s) {
  for (const auto& [name, t] :
       {std::pair<const char*, const at::Tensor&>("seqused_q", in.seqused_q),
        {"seqused_k", in.seqused_k}}) {
    if (!t.defined()) continue;
    check_lengths_tensor(name, t, in.q);
    check_size(name, t.sym_size(0), "the batch size", s.batch);
  }
}

void check_numbers(const Inputs& in, const Shape& s) {
  check_dropout(in.dropout_p);
  TORCH_CHECK(in.softcap >= 0 && std::isfinite(in.softcap),
              "flash_attn: expected softcap >= 0 and finite, got ", in.softcap);
  TORCH_SYM_CHECK(in.prefix.sym_ge(0), "flash_attn: expected prefix >= 0, got ", in.prefix);
  TORCH_SYM_CHECK(s.bound_q.sym_le(kMaxLength).sym_and(s.bound_k.sym_le(kMaxLength)),
                  "flash_attn: expected sequences of at most ", kMaxLength, " tokens, got ",
                  s.bound_q, " queries and ", s.bound_k, " keys");
  TORCH_CHECK(in.dropout_p == 0 || in.rng_state.defined(),
              "flash_attn: expected rng_state with dropout_p = ", in.dropout_p, ", got None");
  if (!in.rng_state.defined()) return;
  check_device("rng_state", in.rng_state, in.q);
  TORCH_CHECK(in.rng_state.scalar_type() == at::kLong && in.rng_state.dim() == 1 &&
                  in.rng_state.sym_size(0) == 2,
              "flash_attn: expected rng_state int64 of shape (2), got ", in.rng_state.scalar_type(),
              " of shape ", in.rng_state.sym_sizes());
}

void check_sizes(const Inputs& in, const Shape& s) {
  const int64_t rows = in.packed() ? 0 : 2, heads = 1;
  check_size("the heads of value", in.v.sym_size(heads), "those of key", s.heads_k);
  check_size("the sequence length of value", in.v.sym_size(rows), "that of key", s.rows_k);
  check_size("the head dimension of key", in.k.sym_size(-1), "that of query", s.head_dim);
  if (!in.packed()) {
    check_size("the batch size of key", in.k.sym_size(0), "that of query", s.batch);
    check_size("the batch size of value", in.v.sym_size(0), "that of query", s.batch);
  }
  const bool divides = s.heads_k == 0 ? s.heads == 0 : s.heads % s.heads_k == 0;
  TORCH_CHECK(divides, "flash_attn: expected the heads of key and value to divide those of query, ",
              s.heads, ", got ", s.heads_k);
}

void check_values(const char* name, const at::Tensor& t, int64_t rows, int64_t bound) {
  const at::Tensor values = t.to(at::kLong).contiguous();
  const int64_t* at = values.const_data_ptr<int64_t>();
  TORCH_CHECK(at[0] >= 0, "flash_attn: expected ", name, " to start at 0 or later, got ", at[0]);
  for (int64_t b = 0; b + 1 < values.numel(); ++b) {
    const int64_t length = at[b + 1] - at[b];
    TORCH_CHECK(length >= 0, "flash_attn: expected ", name, " to ascend, got ", at[b], " before ",
                at[b + 1], " at index ", b);
    TORCH_CHECK(length <= bound, "flash_attn: expected no sequence of ", name, " longer than ",
                "max_seqlen, ", bound, ", got ", length, " at index ", b);
  }
  TORCH_CHECK(at[values.numel() - 1] <= rows, "flash_attn: expected ", name, " to end at ", rows,
              " tokens or before, got ", at[values.numel() - 1]);
}

void check_used(const char* name, const at::Tensor& t, int64_t bound) {
  if (!t.defined() || t.numel() == 0) return;
  const at::Tensor values = t.to(at::kLong).contiguous();
  for (int64_t b = 0; b < values.numel(); ++b) {
    const int64_t length = values.const_data_ptr<int64_t>()[b];
    TORCH_CHECK(length >= 0 && length <= bound, "flash_attn: expected ", name, " in [0, ", bound,
                "], got ", length, " at index ", b);
  }
}

}  // namespace

void check_sdpa(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                const at::Tensor& mask, bool is_causal) {
  check_same_dtype_and_device(query, key, value);
  TORCH_CHECK(query.dim() >= 2 && key.dim() >= 2 && value.dim() >= 2,
              "Expected query, key, and value to all be  at least 2 dimensional, but got ",
              "query.dim: ", query.dim(), " key.dim: ", key.dim(), " and value.dim: ", value.dim(),
              " instead.");
  check_dtype(query);
  if (mask.defined()) {
    const at::ScalarType type = mask.scalar_type();
    TORCH_CHECK(type == at::kBool || type == at::kFloat || type == query.scalar_type(),
                "Expected attn_mask dtype to be bool or float or to match query dtype, but got "
                "attn_mask.dtype: ",
                mask.dtype(), " and  query.dtype: ", query.dtype(), " instead.");
    TORCH_CHECK(!is_causal,
                "_scaled_dot_product_attention: Explicit attn_mask should not be set when "
                "is_causal=True");
    check_device("attn_mask", mask, query);
  }
  check_size("the head dimension of key", key.sym_size(-1), "that of query", query.sym_size(-1));
  check_size("the sequence length of value", value.sym_size(-2), "that of key", key.sym_size(-2));
}

void check_gqa(const c10::SymInt& heads, const c10::SymInt& heads_k, const c10::SymInt& heads_v) {
  const auto divides = [&](const c10::SymInt& part) {
    return part == 0 ? heads == 0 : heads % part == 0;
  };
  TORCH_CHECK(divides(heads_k) && divides(heads_v),
              "Number of heads in key and value must divide the number of heads in query, got ",
              heads_k, " heads in key and ", heads_v, " in value for ", heads, " in query");
}

void check_mask_broadcasts(const at::Tensor& mask, c10::SymIntArrayRef scores) {
  const int64_t rank = int64_t(scores.size()), missing = rank - mask.dim();
  bool fits = missing >= 0;
  for (int64_t dim = 0; fits && dim < mask.dim(); ++dim)
    fits = mask.sym_size(dim) == 1 || mask.sym_size(dim) == scores[missing + dim];
  TORCH_CHECK(fits, "flash_attn: expected attn_mask to broadcast to the scores, ", scores,
              " (batch..., heads, queries, keys), got ", mask.sym_sizes());
}

void check_dropout(double dropout_p) {
  TORCH_CHECK(dropout_p >= 0 && dropout_p <= 1,
              "dropout probability has to be between 0 and 1, but got ", dropout_p);
}

void check_inputs(const Inputs& in) {
  check_same_dtype_and_device(in.q, in.k, in.v);
  check_dtype(in.q);
  check_packing(in);
  const int64_t rank = in.packed() ? 3 : 4;
  const char* meaning =
      in.packed() ? "(tokens, heads, head_dim)" : "(batch, heads, seqlen, head_dim)";
  check_rank("query", in.q, rank, meaning);
  check_rank("key", in.k, rank, meaning);
  check_rank("value", in.v, rank, meaning);
  const Shape s = shape_of(in);
  check_sizes(in, s);
  check_bias_and_mask(in, s);
  check_head_vectors(in, s);
  check_seqused(in, s);
  check_numbers(in, s);
}

void check_weights(const WeightsInputs& all) {
  Inputs in = all.inputs;
  in.v = in.k;
  check_inputs(in);
  check_device("lse", all.lse, in.q);
  TORCH_CHECK(all.lse.scalar_type() == accumulation_type(in.q.scalar_type()),
              "flash_attn: expected lse of dtype ", accumulation_type(in.q.scalar_type()), ", got ",
              all.lse.scalar_type());
  check_rank("lse", all.lse, 3, "(batch, heads, seqlen_q)");
  for (int dim = 0; dim < 3; ++dim)
    check_size("a dimension of lse", all.lse.sym_size(dim), "that of query", in.q.sym_size(dim));
}

void check_weights_gradient(const WeightsInputs& all, const at::Tensor& dweights) {
  const Shape s = shape_of(all);
  check_device("dweights", dweights, all.inputs.q);
  TORCH_CHECK(dweights.scalar_type() == all.inputs.q.scalar_type(),
              "flash_attn: expected dweights of dtype ", all.inputs.q.scalar_type(), ", got ",
              dweights.scalar_type());
  check_rank("dweights", dweights, all.average ? 3 : 4, "like the weights");
  check_size("the batch size of dweights", dweights.sym_size(0), "that of query", s.batch);
  if (!all.average)
    check_size("the heads of dweights", dweights.sym_size(1), "those of query", s.heads);
  check_size("the rows of dweights", dweights.sym_size(-2), "those of query", s.rows_q);
  check_size("the columns of dweights", dweights.sym_size(-1), "the rows of key", s.rows_k);
}

void check_no_gradient(const char* name, const at::Tensor& t) {
  TORCH_CHECK(!t.defined() || !t.requires_grad(), "flash_attn: expected ", name,
              " without requires_grad, got one that requires a gradient; detach() it");
}

void check_gradients(const Inputs& in, const Gradients& gradients) {
  const auto check_like = [&](const char* name, const at::Tensor& t, int64_t rank,
                              at::ScalarType type) {
    if (!t.defined()) return;
    check_device(name, t, in.q);
    check_rank(name, t, rank, "");
    TORCH_CHECK(t.scalar_type() == type, "flash_attn: expected ", name, " of dtype ", type,
                ", got ", t.scalar_type());
  };
  const int64_t rank = in.q.dim();
  const at::ScalarType accumulation = accumulation_type(in.q.scalar_type());
  check_like("dout", gradients.dout, rank, in.q.scalar_type());
  check_like("out", gradients.out, rank, in.q.scalar_type());
  check_like("lse", gradients.lse, rank - 1, accumulation);
  check_like("dlse", gradients.dlse, rank - 1, accumulation);
  const Shape s = shape_of(in);
  for (const at::Tensor& t : {gradients.dout, gradients.out}) {
    if (!t.defined()) continue;
    for (int64_t dim = 0; dim + 1 < rank; ++dim)
      check_size("a dimension of out or dout", t.sym_size(dim), "that of query",
                 in.q.sym_size(dim));
    check_size("the last dimension of out or dout", t.sym_size(-1), "that of value", s.head_dim_v);
  }
  for (const at::Tensor& t : {gradients.dlse, gradients.lse}) {
    if (!t.defined()) continue;
    check_size("the heads of lse", t.sym_size(in.packed() ? 0 : 1), "those of query", s.heads);
    check_size("the rows of lse", t.sym_size(-1), "those of query", s.rows_q);
    if (!in.packed()) check_size("the batch size of lse", t.sym_size(0), "that of query", s.batch);
  }
}

void check_lengths(const Inputs& in) {
  const Shape s = shape_of(in);
  const int64_t bound_q = s.bound_q.expect_int(), bound_k = s.bound_k.expect_int();
  if (in.packed()) {
    check_values("cu_seqlens_q", in.cu_seqlens_q, s.rows_q.expect_int(), bound_q);
    check_values("cu_seqlens_k", in.cu_seqlens_k, s.rows_k.expect_int(), bound_k);
  }
  check_used("seqused_q", in.seqused_q, bound_q);
  check_used("seqused_k", in.seqused_k, bound_k);
}

void refuse_backend(const std::string& name, const std::vector<std::string>& reasons) {
  TORCH_CHECK(false, "flash_attn: backend '", name, "' was chosen by use_backend and cannot take ",
              "this call: ", c10::Join("; ", reasons));
}

void refuse_device(const std::string& name, c10::DeviceType device, const std::string& candidates) {
  TORCH_CHECK(false, "flash_attn: backend '", name, "' was chosen by use_backend and does not run ",
              "on ", c10::DeviceTypeName(device, /*lower_case=*/true),
              "; backends for this device: ", candidates);
}

void refuse_all_backends(const std::vector<std::string>& reasons) {
  TORCH_CHECK(false, "flash_attn: no backend can take this call: ", c10::Join("; ", reasons));
}

void refuse_backend_name(const std::string& name, const std::string& known) {
  TORCH_CHECK_VALUE(false, "flash_attn: expected a backend of this build, ", known, ", got '", name,
                    "'");
}

void refuse_cuda_tensors() {
  TORCH_CHECK(false,
              "flash_attn: got CUDA tensors, but this build has no CUDA backend; rebuild with "
              "FLASH_ATTN_CUDA=1 pip install --no-build-isolation .");
}

}  // namespace flash::ops
