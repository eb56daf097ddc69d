// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "cuda/tile_config.h"

namespace flash::cuda::sm80 {

// Shared memory of a CTA, for the host to compare with what the device has. The kernels assert that
// their storage is no larger.

constexpr int64_t forward_shared_bytes(int head_dim, Variant variant) {
  const TileConfig t = sm80_forward_tiles(head_dim, variant);
  return int64_t(2) * head_dim * (t.block_m + 2 * t.block_n);
}

constexpr int64_t backward_shared_bytes(int head_dim, Variant variant) {
  const TileConfig t = sm80_backward_tiles(head_dim, variant);
  const int64_t elements =
      head_dim * (2 * t.block_n + 2 * t.num_stages * t.block_m) + int64_t(t.block_n) * t.block_m;
  return 2 * elements + 8 * t.num_stages * t.block_m;
}

}  // namespace flash::cuda::sm80
