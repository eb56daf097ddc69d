// SPDX-License-Identifier: BSD-3-Clause
// From the fp32 sums of dq in the workspace (DqTiles) to dq: scaled, rounded once. Within a tile
// the sums lie in the order of a CTA's accumulators, so that those who add to them and this kernel
// move 16 bytes per lane, side by side.
#pragma once

#include "cuda/common/dq_tiles.h"
#include "cuda/common/global_matrix.cuh"
#include "cuda/common/pair_score.cuh"
#include "primitives/tile/copy.cuh"

namespace flash::cuda {

/// A tile of dq (kBlockM x kHeadDim) among the warps of a CTA: kWarpsM share the rows, and those of
/// the same rows take turns in blocks of 16 columns.
template <int kBlockM_, int kHeadDim_, int kWarps, int kWarpsM>
struct DqTile {
  static constexpr int kBlockM = kBlockM_, kHeadDim = kHeadDim_, kNumThreads = 32 * kWarps;
  static constexpr int kElements = kBlockM * kHeadDim, kWarpsCols = kWarps / kWarpsM;
  static constexpr int kRows = kBlockM / kWarpsM, kCols = kHeadDim / kWarpsCols;
  static_assert(kWarps % kWarpsM == 0 && kRows % 16 == 0 && kCols % 16 == 0,
                "a warp owns whole blocks of 16 x 16");
  using Accumulator = RegisterTile<kRows, kCols>;

  static FLASH_DEVICE int first_row() { return int(threadIdx.x / 32) % kWarpsM * kRows; }
  static FLASH_DEVICE int first_col() { return int(threadIdx.x / 32) / kWarpsM * 16; }

  /// f(this lane's four floats of the tile in memory, the same four of the accumulator)
  template <class Float, class F>
  static FLASH_DEVICE void for_each_quad(Float* tile, Accumulator& accumulator, F&& f) {
    Float* const own = tile + 4 * threadIdx.x;
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
  __shared__ __align__(128) Element staged[Tile::kElements];
  const SharedTile<Element, Tile::kBlockM, Tile::kHeadDim> sDQ(staged);

  const CtaPlace cta = CtaPlace::of(blockIdx.x, {1, m_blocks, p.num_heads, p.batch});
  const Sequence sequence = Sequence::of(p.q_layout, cta.batch);
  if (cta.block * Tile::kBlockM >= sequence.length) return;

  const DqTiles tiles = DqTiles::of(p, Tile::kBlockM);
  const int64_t tile = tiles.first(p.q_layout, sequence, cta.batch, cta.head) + cta.block;
  typename Tile::Accumulator accumulator;
  Tile::for_each_quad(sums + tile * Tile::kElements, accumulator,
                      [](const float* place, float (&quad)[4]) {
                        const float4 x = *reinterpret_cast<const float4*>(place);
                        quad[0] = x.x, quad[1] = x.y, quad[2] = x.z, quad[3] = x.w;
                      });
  accumulator.multiply(float(p.softmax_scale));
  round_to_tile<Tile::kWarpsCols>(accumulator, sDQ, Tile::first_row(), Tile::first_col());
  __syncthreads();
  const auto gDQ = matrix_of<Element>(p.dq, sequence, cta.head, p.head_dim);
  store_tile<Tile::kNumThreads>(sDQ, gDQ, cta.block * Tile::kBlockM);
}

}  // namespace flash::cuda
