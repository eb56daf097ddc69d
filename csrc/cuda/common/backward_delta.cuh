// SPDX-License-Identifier: BSD-3-Clause
// delta_i = sum_d dO_id O_id - dLSE_i, and 0 for rows without a key: their gradients are 0 whatever
// dO and dLSE hold. One warp per query row.
#pragma once

#include "cuda/common/pair_score.cuh"
#include "cuda/launch.cuh"
#include "primitives/fma_product.cuh"

namespace flash::cuda {

inline constexpr int kDeltaWarps = 8;

template <class Element>
__global__ void __launch_bounds__(kDeltaWarps * 32)
    backward_delta_kernel(const __grid_constant__ BackwardParams p, const RowView delta) {
  using Real = Accumulator<Element>;
  constexpr int kVec = FmaTile<Real>::kVec;
  const int lane = threadIdx.x % 32;
  const int64_t index = int64_t(blockIdx.x) * kDeltaWarps + threadIdx.x / 32;
  const int row = int(index % p.q_layout.max), head = int(index / p.q_layout.max % p.num_heads);
  const int batch = int(index / p.q_layout.max / p.num_heads);
  if (batch >= p.batch) return;
  const Sequence s = Sequence::of(p.q_layout, batch);
  if (row >= s.length) return;

  const MatrixRows<Real, Element> out(p.out.data, p.out.offset(s, head), p.out.row_stride, s.length,
                                      p.head_dim_v);
  const MatrixRows<Real, Element> dout(p.dout.data, p.dout.offset(s, head), p.dout.row_stride,
                                       s.length, p.head_dim_v);
  const auto vector_of = [&](const MatrixRows<Real, Element>& rows, int d) {
    const Element* at = rows.data + row * rows.row_stride + d;
    return rows.aligned ? rows.template load<true>(at, rows.width - d)
                        : rows.template load<false>(at, rows.width - d);
  };
  Real sum = 0;
  for (int d = lane * kVec; d < p.head_dim_v; d += 32 * kVec) {
    const auto x = vector_of(out, d), y = vector_of(dout, d);
#pragma unroll
    for (int e = 0; e < kVec; ++e) sum += x.x[e] * y.x[e];
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  if (lane != 0) return;
  if (p.dlse.data) sum -= static_cast<const Real*>(p.dlse.data)[p.dlse.offset(s, head) + row];
  const Real lse = static_cast<const Real*>(p.lse.data)[p.lse.offset(s, head) + row];
  static_cast<Real*>(delta.data)[delta.offset(s, head) + row] = isinf(lse) ? Real(0) : sum;
}

template <DType kDType>
void launch_backward_delta(const BackwardParams& p, const RowView& delta, void* stream) {
  const int64_t rows = int64_t(p.batch) * p.num_heads * p.q_layout.max;
  launch(backward_delta_kernel<Element<kDType>>, ceil_div(rows, kDeltaWarps), kDeltaWarps * 32, 0,
         stream, p, delta);
}

}  // namespace flash::cuda
