// SPDX-License-Identifier: BSD-3-Clause
// The gradient of the queries is a sum over key blocks that different CTAs compute. They add into
// fp32 tiles in the workspace, each in the order in which the accumulators of a warp lie (DqTile);
// one kernel then scales, rounds and writes dq.
#pragma once

#include "attention/params.h"
#include "cuda/common/pair_score.cuh"
#include "cuda/sm80/matrices.cuh"
#include "primitives/ptx/red_add.cuh"
#include "primitives/tile/copy.cuh"

namespace flash::cuda {

/// Where the tiles of dq lie in the workspace. A sequence of a packed tensor starts at tile
/// first_row / block_m + b, which leaves room for the ragged ends of the b sequences before it.
struct DqTiles {
  int block_m;
  int64_t tiles_per_head;

  static FLASH_HOST_DEVICE DqTiles of(const ForwardParams& p, int block_m) {
    const int64_t blocks = (p.q_layout.max + block_m - 1) / block_m;
    return {block_m,
            p.q_layout.packed() ? p.q_layout.total / block_m + p.batch : blocks * p.batch};
  }
  FLASH_HOST_DEVICE int64_t count(const ForwardParams& p) const {
    return tiles_per_head * p.num_heads;
  }
  /// Number of the first tile of a (sequence, head).
  FLASH_HOST_DEVICE int64_t first(const ForwardParams& p, const Sequence& sequence, int batch,
                                  int head) const {
    const int64_t blocks = (p.q_layout.max + block_m - 1) / block_m;
    return head * tiles_per_head +
           (p.q_layout.packed() ? sequence.first_row / block_m + batch : blocks * batch);
  }
};

/// A tile of dq (kBlockM x kHeadDim) among kWarps warps: kWarpsM share the rows, and those of the
/// same rows take turns in blocks of 16 columns.
template <int kBlockM_, int kHeadDim_, int kWarps, int kWarpsM>
struct DqTile {
  static constexpr int kBlockM = kBlockM_, kHeadDim = kHeadDim_, kNumThreads = 32 * kWarps;
  static constexpr int kWarpsCols = kWarps / kWarpsM;
  static constexpr int kRows = kBlockM / kWarpsM, kCols = kHeadDim / kWarpsCols;
  static constexpr int kElements = kBlockM * kHeadDim;
  static_assert(kWarps % kWarpsM == 0 && kRows % 16 == 0 && kCols % 16 == 0,
                "a warp owns whole blocks of 16 x 16");
  using Accumulator = RegisterTile<kRows, kCols>;

  static FLASH_DEVICE int first_row() { return int(threadIdx.x / 32) % kWarpsM * kRows; }
  static FLASH_DEVICE int first_col() { return int(threadIdx.x / 32) / kWarpsM * 16; }

  /// f(float4 position of this lane in the tile, m16n8 tile of the accumulator)
  template <class F>
  static FLASH_DEVICE void for_each_quad(float* tile, Accumulator& accumulator, F&& f) {
    float* const own = tile + 4 * threadIdx.x;
#pragma unroll
    for (int m = 0; m < Accumulator::kTilesM; ++m)
#pragma unroll
      for (int n = 0; n < Accumulator::kTilesN; ++n)
        f(own + (m * Accumulator::kTilesN + n) * 4 * kNumThreads, accumulator.at[m][n]);
  }
};

template <class Element, class Tile>
__global__ void __launch_bounds__(Tile::kNumThreads)
    convert_dq_kernel(const __grid_constant__ BackwardParams p, const float* sums, int m_blocks) {
  using StagedTile = SharedTile<Element, Tile::kBlockM, Tile::kHeadDim>;
  __shared__ __align__(128) Element staged[Tile::kElements];

  const CtaPlace cta = CtaPlace::of(blockIdx.x, /*panels=*/1, m_blocks, p.num_heads);
  const Sequence sequence = Sequence::of(p.q_layout, cta.batch);
  if (cta.block * Tile::kBlockM >= sequence.length) return;

  const int64_t tile = DqTiles::of(p, Tile::kBlockM).first(p, sequence, cta.batch, cta.head);
  typename Tile::Accumulator accumulator;
  Tile::for_each_quad(const_cast<float*>(sums) + (tile + cta.block) * Tile::kElements, accumulator,
                      [&](const float* place, float(&quad)[4]) {
                        const float4 x = *reinterpret_cast<const float4*>(place);
                        quad[0] = x.x, quad[1] = x.y, quad[2] = x.z, quad[3] = x.w;
                      });
  accumulator.multiply(float(p.softmax_scale));
  const StagedTile sDQ(staged);
  round_to_tile<Tile::kWarpsCols>(accumulator, sDQ, Tile::first_row(), Tile::first_col());
  __syncthreads();
  const auto gDQ = sm80::matrix_of<Element>(p.dq, sequence, cta.head, p.head_dim);
  store_tile<Tile::kNumThreads>(sDQ, gDQ, cta.block * Tile::kBlockM);
}

}  // namespace flash::cuda
