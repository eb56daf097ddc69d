// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm90/key_runs.h"

#include "cuda/sm90/tensor_map.h"

namespace flash::cuda::sm90 {

bool has_key_runs(const ForwardParams& p) {
  const PairView& mask = p.features.score_mod.mask;
  if (!mask.data || mask.q_stride != 0 || p.k_layout.max == 0) return false;
  const SequenceLayout keys = cut_to_runs(p.k_layout);
  return why_no_tma_tensor("k", p, p.k, keys, p.num_heads_k, p.head_dim).empty() &&
         why_no_tma_tensor("v", p, p.v, keys, p.num_heads_k, p.head_dim_v).empty();
}

bool runs_are_plain(const ForwardParams& p) {
  ForwardParams without_mask = p;
  without_mask.features.score_mod.mask = {};
  return without_mask.variant() == Variant::kPlain && p.mask.prefix == 0;
}

SequenceLayout cut_to_runs(const SequenceLayout& keys) {
  static const int32_t of_its_own = 0;  // what the host asks is whether there are any
  SequenceLayout cut = keys;
  cut.seqused = &of_its_own;
  return cut;
}

}  // namespace flash::cuda::sm90
