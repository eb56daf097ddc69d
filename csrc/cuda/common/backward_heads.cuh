// SPDX-License-Identifier: BSD-3-Clause
// Gradients of parameters that a head has one of:
//   dslope_h = -sum dS |q + diagonal_offset - k|       (h), or (b, h)
//   dsink_h  = -sum_i exp(sink_h - lse_i) delta_i      (h)
// Partial sums of a (sequence, head, block of queries) go to the workspace and are added in index
// order: no atomics.
#pragma once

#include "cuda/common/pair_kernels.cuh"
#include "cuda/tile_config.h"

namespace flash::cuda {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    backward_slopes_kernel(const __grid_constant__ BackwardParams p, const RowView delta,
                           typename Traits::Real* partials, int blocks) {
  using Tile = typename Traits::Tile;
  using Real = typename Traits::Real;
  using Block = QueryBlock<Traits, BackwardParams>;
  constexpr int kCols = Traits::kCols;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_bytes);
  __shared__ Real per_warp[8];

  const int m = int(blockIdx.x % blocks), head = int(blockIdx.x / blocks % p.num_heads);
  const int batch = int(blockIdx.x / blocks / p.num_heads);
  const Block block(p, delta, batch, head, m);
  Real sum = 0;
  int stage = 0;
  if (!block.is_empty()) {
#pragma unroll 1
    for (int n = block.range.visit.begin; n < block.range.visit.end; ++n) {
      block.for_each_gradient(shared.scores, shared.stages, stage, n, [&](int i, int j, Real ds) {
        const int q = block.first_q + Tile::row(i), k = n * kCols + Tile::col(j);
        sum -= ds * abs_of(Real(q + block.score.diagonal_offset - k));
      });
    }
  }
  sum = sum_over_cta(sum, per_warp);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

/// slopes[b][h] = sum over blocks, or slopes[h] = sum over batch and blocks, of
/// partials[b][h][block]. One CTA per output.
template <class Real>
__global__ void __launch_bounds__(256)
    sum_partials_kernel(Real* slopes, const Real* partials, int batch, int num_heads, int blocks,
                        bool per_batch) {
  __shared__ Real per_warp[8];
  const int head = blockIdx.x % num_heads;
  const int first = per_batch ? blockIdx.x / num_heads : 0;
  const int64_t count = int64_t(per_batch ? 1 : batch) * blocks;
  Real sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x)
    sum += partials[((first + i / blocks) * num_heads + head) * blocks + i % blocks];
  sum = sum_over_cta(sum, per_warp);
  if (threadIdx.x == 0) slopes[blockIdx.x] = sum;
}

/// One CTA per head.
template <class Real>
__global__ void __launch_bounds__(256)
    backward_sink_kernel(const __grid_constant__ BackwardParams p, const RowView delta) {
  __shared__ Real per_warp[8];
  const int head = blockIdx.x;
  const Real sink = p.features.sink.of<Real>(head);
  Real sum = 0;
  for (int batch = 0; batch < p.batch; ++batch) {
    const Sequence s = Sequence::of(p.q_layout, batch);
    for (int q = threadIdx.x; q < s.length; q += blockDim.x)
      sum -= exp_of(sink - lse_of<Real>(p.lse, s, head, q)) * delta_of<Real>(delta, s, head, q);
  }
  sum = sum_over_cta(sum, per_warp);
  if (threadIdx.x == 0) static_cast<Real*>(p.dsink)[head] = sum;
}

/// `partials` has room for batch x heads x ceil(seqlen_q / simt_rows(dtype)) numbers.
template <DType kDType>
void launch_backward_slopes(const BackwardParams& p, const RowView& delta, void* partials,
                            void* stream) {
  using Traits = PairTraits<kDType>;
  using Real = typename Traits::Real;
  const int blocks = int(ceil_div(p.q_layout.max, simt_rows(kDType)));
  static_assert(simt_rows(kDType) == Traits::kRows, "the workspace is sized by simt_rows");
  launch(backward_slopes_kernel<Traits>, int64_t(p.batch) * p.num_heads * blocks, Traits::kThreads,
         sizeof(typename Traits::SharedStorage), stream, p, delta, static_cast<Real*>(partials),
         blocks);
  launch(sum_partials_kernel<Real>, int64_t(p.slopes_per_batch ? p.batch : 1) * p.num_heads, 256, 0,
         stream, static_cast<Real*>(p.dslopes), static_cast<const Real*>(partials), p.batch,
         p.num_heads, blocks, p.slopes_per_batch);
}

template <DType kDType>
void launch_backward_sink(const BackwardParams& p, const RowView& delta, void* stream) {
  launch(backward_sink_kernel<Accumulator<Element<kDType>>>, p.num_heads, 256, 0, stream, p, delta);
}

}  // namespace flash::cuda
