// SPDX-License-Identifier: BSD-3-Clause
// The tuning table, read by kernels and by the host: it decides speed, never results.
#pragma once

#include "cuda/spec.h"

namespace flash::cuda {

/// Compiled head-dim buckets of sm80; a problem takes the smallest that holds both head dims.
inline constexpr int kSm80HeadDims[] = {64, 96, 128, 192, 256};

/// A CTA of simt has 256 threads and 16 bytes of neighbouring rows per thread.
constexpr int simt_rows(DType dtype) { return dtype == DType::kFloat64 ? 64 : 128; }

/// Columns of an output that one simt CTA computes; wider outputs take several CTAs, each of which
/// recomputes the scores. fp32 has both widths; fp64 has registers for the narrow one; fp16 and
/// bf16 come here mostly for wide heads.
constexpr int simt_panel(DType dtype, int head_dim) {
  if (dtype == DType::kFloat64) return 64;
  if (dtype == DType::kFloat32 && head_dim <= 64) return 64;
  return 128;
}

/// simt: columns of the tile of scores, and CTAs that share a multiprocessor's registers.
struct SimtTile {
  int cols, min_ctas;
};

constexpr SimtTile simt_forward_tile(DType, int /*panel*/, Variant) { return {64, 1}; }
constexpr SimtTile simt_backward_tile(DType, int /*panel*/, Variant) { return {64, 1}; }

/// sm80: rows and keys of a CTA's tiles, its warps, and copies of the streamed tiles in flight.
struct TileConfig {
  int block_m, block_n, num_warps, num_stages;
};

/// Warps share the query rows. K and V have one buffer each: one is loaded while the other is used.
constexpr TileConfig sm80_forward_tiles(int head_dim, Variant) {
  if (head_dim <= 64) return {.block_m = 128, .block_n = 128, .num_warps = 4, .num_stages = 1};
  if (head_dim <= 128) return {.block_m = 128, .block_n = 64, .num_warps = 4, .num_stages = 1};
  return {.block_m = 128, .block_n = 64, .num_warps = 8, .num_stages = 1};
}

/// Warps share the keys. Q and dO have num_stages buffers each.
constexpr TileConfig sm80_backward_tiles(int head_dim, Variant) {
  if (head_dim <= 128) return {.block_m = 64, .block_n = 128, .num_warps = 8, .num_stages = 2};
  return {.block_m = 32, .block_n = 64, .num_warps = 4, .num_stages = 2};
}

}  // namespace flash::cuda
