// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>

#include "cuda/common/dq_tiles.h"
#include "cuda/kernels.h"
#include "cuda/tile_config.h"

namespace flash::cuda::sm80 {

int64_t backward_scratch_bytes(const BackwardParams& p) {
  for (int bucket : kSm80HeadDims) {
    if (std::max(p.head_dim, p.head_dim_v) > bucket) continue;
    const int block_m = sm80_backward_tiles(bucket, p.variant()).block_m;
    return DqTiles::of(p, block_m).count(p.num_heads) * dq_tile_bytes(bucket, block_m);
  }
  return 0;
}

}  // namespace flash::cuda::sm80
