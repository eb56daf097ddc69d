// SPDX-License-Identifier: BSD-3-Clause
// The tuning table, read by kernels and by the host: it decides speed, never results.
#pragma once

#include "cuda/spec.h"

namespace flash::cuda {

/// Compiled head-dim buckets of sm80; a problem takes the smallest that holds both head dims.
inline constexpr int kSm80HeadDims[] = {64, 96, 128, 192, 256};

/// Rows of a tile of simt: 256 threads have 16 bytes of neighbouring rows each, 128 twice as many.
constexpr int simt_rows(DType dtype) { return dtype == DType::kFloat64 ? 64 : 128; }

/// Columns of an output that one simt CTA computes; wider outputs take several CTAs, each of which
/// recomputes the scores. fp32 has both widths; fp64 has registers for the narrow one; fp16 and
/// bf16 come here mostly for wide heads.
constexpr int simt_panel(DType dtype, int head_dim) {
  if (dtype == DType::kFloat64) return 64;
  if (dtype == DType::kFloat32 && head_dim <= 64) return 64;
  return 128;
}

/// simt, backward: columns of the tile of scores. Without features 128 gain 5 to 15 % over 64 in
/// fp32 (H100, head dims 64 and 128, 1k and 4k tokens); elsewhere registers and shared memory hold
/// 64.
///
/// fp32, 4k tokens, full | causal, TFLOP/s on one H200 with dq added atomically: d 64 36.1 | 34.1,
/// d 128 36.4 | 34.7 (with asynchronous copies 35.3 | 33.5 and 34.1 | 32.4); torch 2.11's
/// memory-efficient backend 35.5 | 33.4 and 36.6 | 35.9.
constexpr int simt_cols(DType dtype, Variant variant) {
  return dtype == DType::kFloat32 && variant == Variant::kPlain ? 128 : 64;
}

/// simt, forward: warps of a CTA, vectors of 16 bytes of rows that a thread has, keys of a tile,
/// and CTAs that share a multiprocessor.
struct SimtForwardTile {
  int warps, row_vectors, cols, ctas;
};
/// fp32, 4k tokens, full | causal, TFLOP/s on one H200, where cuBLAS multiplies fp32 matrices at
/// 51:
///   d 64:  4 warps of 8 rows x 64 keys, 2 CTAs 41.1 | 41.5;  without chunks begun ahead of their
///          product 39.9 | 39.5;  3 CTAs, so 168 registers and spills, 39.9 | 38.9;  x 128 keys
///          35.2 | 35.8;  8 warps of 4 rows x 128 keys, Q streamed, 1 CTA 29.6 | 28.2
///   d 128: 4 warps of 8 rows x 64 keys, 2 CTAs 44.6 | 44.3;  without chunks begun ahead
///          42.7 | 42.4;  K and V through registers, which leaves none to read shared memory ahead,
///          36.2 | 29.8;  8 warps of 4 rows x 128 keys, Q streamed, 1 CTA 32.5 | 30.3
/// torch 2.11's memory-efficient backend: 36.0 | 34.0 and 46.1 | 44.4.
constexpr SimtForwardTile simt_forward_tile(DType dtype, Variant variant) {
  if (dtype == DType::kFloat32 && variant == Variant::kPlain)
    return {.warps = 4, .row_vectors = 2, .cols = 64, .ctas = 2};
  return {.warps = 8, .row_vectors = 1, .cols = 64, .ctas = 1};
}

/// sm80: rows and keys of a CTA's tiles, its warps, and copies of the streamed tiles in flight.
struct TileConfig {
  int block_m, block_n, num_warps, num_stages;
};

/// Warps share the query rows. K and V have one buffer each: one is loaded while the other is used.
/// H100, bf16, TFLOP/s at 8k tokens, full | causal (others within 128 x 128 of shared memory lose):
///   d 64:  128 x 128 x 4 warps 326 | 305;  128 x 96 305 | 292;  128 x 64 289 | 276
///          64 x 64 287 | 271
///   d 128: 128 x 64 x 4 warps  373 | 331;  64 x 64 311 | 287;  128 x 128 x 8 275 | 264
/// Score modifications need registers for addresses: smaller tiles, or they spill.
constexpr TileConfig sm80_forward_tiles(int head_dim, Variant variant) {
  const bool is_general = variant == Variant::kGeneral;
  if (head_dim <= 64)
    return {.block_m = 128, .block_n = is_general ? 64 : 128, .num_warps = 4, .num_stages = 1};
  if (head_dim <= 128)
    return {.block_m = is_general ? 64 : 128, .block_n = 64, .num_warps = 4, .num_stages = 1};
  return {.block_m = 128, .block_n = 64, .num_warps = 8, .num_stages = 1};
}

/// Warps share the keys. Q and dO have two buffers each.
/// H100, bf16, TFLOP/s at 8k tokens, full | causal:
///   d 64:  64 x 128 x 4 warps 328 | 302;  32 x 128 x 4 287 | 271;  128 x 128 x 8 276 | 260;
///          64 x 64 x 4 270 | 246;  64 x 128 x 8 253 | 240
///   d 128: 64 x 128 x 8 warps 292 | 265;  64 x 64 x 4 271 | 255;  32 x 128 x 8 247 | 237
/// A warp of 32 keys reads Q and dO half as often from shared memory as one of 16, but has the
/// registers for it only at d 64 without score modifications.
constexpr TileConfig sm80_backward_tiles(int head_dim, Variant variant) {
  const bool is_general = variant == Variant::kGeneral;
  if (head_dim <= 64)
    return {.block_m = 64, .block_n = 128, .num_warps = is_general ? 8 : 4, .num_stages = 2};
  if (head_dim <= 96) return {.block_m = 64, .block_n = 128, .num_warps = 8, .num_stages = 2};
  if (head_dim <= 128)
    return {.block_m = is_general ? 32 : 64, .block_n = 128, .num_warps = 8, .num_stages = 2};
  return {.block_m = 32, .block_n = 64, .num_warps = 4, .num_stages = 2};
}

}  // namespace flash::cuda
