// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm90/support.h"

#include <algorithm>
#include <limits>

#include "cuda/sm90/tensor_map.h"

namespace flash::cuda::sm90 {
namespace {

constexpr int64_t kMostRaggedBytes = int64_t{4} << 30;

int smallest_bucket(const ForwardParams& p, std::initializer_list<int> buckets) {
  const int head_dim = std::max(p.head_dim, p.head_dim_v);
  for (int bucket : buckets)
    if (head_dim <= bucket) return bucket;
  return 0;
}

std::vector<std::string> why_unsupported(const ForwardParams& p, int bucket, int largest) {
  std::vector<std::string> reasons;
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16)
    reasons.push_back("the dtype is neither float16 nor bfloat16");
  if (bucket == 0) reasons.push_back("a head dim is larger than " + std::to_string(largest));
  if (p.head_dim % 8 != 0 || p.head_dim_v % 8 != 0 || p.head_dim == 0 || p.head_dim_v == 0)
    reasons.push_back("a head dim is not a positive multiple of 8");
  if (!reasons.empty()) return reasons;
  const int64_t longest = std::max(p.q_layout.max, p.k_layout.max);
  if ((longest + 63) / 64 * p.num_heads * p.batch > std::numeric_limits<int>::max())
    reasons.push_back("there are more than 2^31 blocks of 64 rows");
  const SequenceLayout &queries = p.q_layout, &keys = p.k_layout;
  for (const std::string& reason :
       {why_no_tma_tensor("q", p, p.q, queries, p.num_heads, p.head_dim),
        why_no_tma_tensor("k", p, p.k, keys, p.num_heads_k, p.head_dim),
        why_no_tma_tensor("v", p, p.v, keys, p.num_heads_k, p.head_dim_v),
        why_no_tma_tensor("out", p, p.out, queries, p.num_heads, p.head_dim_v)})
    if (!reason.empty()) reasons.push_back(reason);
  return reasons;
}

}  // namespace

bool is_causal(const ForwardParams& p) {
  return p.mask.window_right < IntervalMask::kUnbounded &&
         p.mask.window_left >= IntervalMask::kUnbounded;
}

bool is_ragged(const ForwardParams& p) { return p.q_layout.ragged() || p.k_layout.ragged(); }

int forward_head_dim(const ForwardParams& p) { return smallest_bucket(p, {64, 96, 128, 192, 256}); }
int backward_head_dim(const ForwardParams& p) { return forward_head_dim(p); }

std::vector<std::string> why_forward_unsupported(const ForwardParams& p) {
  return why_unsupported(p, forward_head_dim(p), 256);
}
std::vector<std::string> why_backward_unsupported(const ForwardParams& p) {
  std::vector<std::string> reasons = why_unsupported(p, backward_head_dim(p), 256);
  // Sums of dQ and rows of lse have room for the longest sequence in place of every one.
  const int64_t padded_rows = int64_t{p.q_layout.max} * p.num_heads * p.batch;
  if (is_ragged(p) && padded_rows * backward_head_dim(p) * 4 > kMostRaggedBytes)
    reasons.push_back("sequences, padded to the longest, need more than 4 GiB of workspace");
  if (p.mask.window_left < IntervalMask::kUnbounded &&
      p.mask.window_right < IntervalMask::kUnbounded &&
      p.mask.window_left + p.mask.window_right < 0)
    reasons.push_back("the window is empty");
  return reasons;
}

bool gradients_are_aligned(const BackwardParams& p) {
  const auto is_aligned = [&](const TensorView& tensor, const SequenceLayout& layout, int heads,
                              int columns) {
    return why_no_tma_tensor("", p, tensor, layout, heads, columns).empty();
  };
  return is_aligned(p.dout, p.q_layout, p.num_heads, p.head_dim_v) &&
         is_aligned(p.dq, p.q_layout, p.num_heads, p.head_dim) &&
         is_aligned(p.dk, p.k_layout, p.num_heads_k, p.head_dim) &&
         is_aligned(p.dv, p.k_layout, p.num_heads_k, p.head_dim_v);
}

bool writes_bias_gradient(const BackwardParams& p) {
  const int (&shape)[4] = p.bias_shape;
  return p.dbias && !p.features.score_mod.bias_is_float32 && !p.features.score_mod.has_softcap() &&
         shape[0] == p.batch && shape[1] == p.num_heads && shape[2] == p.q_layout.max &&
         shape[3] == p.k_layout.max && shape[2] > 0 && shape[3] > 0 && shape[3] % 8 == 0 &&
         reinterpret_cast<uintptr_t>(p.dbias) % 16 == 0;
}

bool sums_bias_gradient(const BackwardParams& p) {
  return p.dbias && !writes_bias_gradient(p) && p.bias_shape[2] == p.q_layout.max &&
         p.bias_shape[3] == p.k_layout.max && p.features.score_mod.bias.q_stride != 0;
}

bool fills_bias_gradient(const BackwardParams& p) {
  const bool visits_all = p.mask.window_left >= IntervalMask::kUnbounded &&
                          p.mask.window_right >= IntervalMask::kUnbounded && !is_ragged(p);
  return sums_bias_gradient(p) || (writes_bias_gradient(p) && visits_all);
}

}  // namespace flash::cuda::sm90
