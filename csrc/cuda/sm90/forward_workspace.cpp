// SPDX-License-Identifier: BSD-3-Clause
// The workspace of a forward: a counter of tiles and those of KeyRuns; runs; order of sequences.
#include "cuda/sm90/key_runs.h"
#include "cuda/sm90/sequence_order.h"
#include "cuda/sm90/support.h"

namespace flash::cuda::sm90 {
namespace {

constexpr int64_t kCounterBytes = 16;

/// Rows of the mask: those of a dimension that it broadcasts are one.
struct MaskRows {
  int batch, heads;

  static MaskRows of(const ForwardParams& p) {
    const PairView& mask = p.features.score_mod.mask;
    return {mask.batch_stride == 0 ? 1 : p.batch, mask.head_stride == 0 ? 1 : p.num_heads};
  }
};

int64_t run_bytes(const ForwardParams& p) {
  if (!has_key_runs(p)) return 0;
  const MaskRows rows = MaskRows::of(p);
  return int64_t{rows.batch} * rows.heads * int64_t{sizeof(KeyRun)};
}

}  // namespace

KeyRuns key_runs(const ForwardParams& p, void* workspace) {
  const MaskRows rows = MaskRows::of(p);
  const auto bytes = static_cast<char*>(workspace);
  return {reinterpret_cast<KeyRun*>(bytes + kCounterBytes),
          reinterpret_cast<int*>(bytes + sizeof(unsigned)), rows.batch == 1 ? 0 : rows.heads,
          rows.heads == 1 ? 0 : 1};
}

SequenceOrder sequence_order(const ForwardParams& p, void* workspace) {
  if (!is_ragged(p)) return {};
  const auto batch =
      reinterpret_cast<int*>(static_cast<char*>(workspace) + kCounterBytes + run_bytes(p));
  return {batch, batch + p.batch};
}

int64_t forward_workspace_bytes(const ForwardParams& p) {
  if (!is_causal(p) && !is_ragged(p) && !has_key_runs(p)) return 0;  // tiles in a fixed order
  const int64_t order_bytes = is_ragged(p) ? (int64_t{2} * p.batch + 1) * sizeof(int) : 0;
  return kCounterBytes + run_bytes(p) + order_bytes;
}

}  // namespace flash::cuda::sm90
