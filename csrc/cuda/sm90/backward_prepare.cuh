// SPDX-License-Identifier: BSD-3-Clause
// The kernel before the main ones.
#pragma once

#include <bit>

#include "cuda/sm90/backward_dq.cuh"

namespace flash::cuda::sm90 {

/// delta = rowsum(dO o O) - dLSE, lse log2 e (general variant: lse), and zeros in the sums of dQ
/// (if there are any) and in the counters. One CTA per block of queries and head. Rows that keep
/// nothing (an infinite lse) get +inf: P = 0.
template <class Traits>
__global__ void __launch_bounds__(256)
    prepare_kernel(const __grid_constant__ BackwardParams p,
                   const __grid_constant__ BackwardSchedule schedule) {
  using Element = typename Traits::Element;
  constexpr int kBlockM = Traits::kBlockM;
  constexpr int kLanes = std::bit_ceil(unsigned(Traits::kChunksV) * 8);  // of 8 columns
  const int m_block = blockIdx.x % schedule.num_m_blocks;
  const int head = blockIdx.x / schedule.num_m_blocks;  // of the whole batch
  const int64_t block = blockIdx.x;
  ptx::launch_next_grid();  // keys_kernel may set itself up
  if (block == 0 && threadIdx.x < 2) schedule.next_tile[threadIdx.x] = 0;
  if constexpr (Traits::kSumsDq) {
    if (head < schedule.dq_slots) {
      auto* sums = reinterpret_cast<float4*>(schedule.dq_sums + block * Traits::kDqSize);
      for (int i = threadIdx.x; i < Traits::kDqSize / 4; i += blockDim.x) sums[i] = float4{};
      if (threadIdx.x == 0) {
        schedule.arrivals[block] = 0;
        if (m_block == 0) schedule.cleared[head] = 0;
      }
    }
  }
  const Sequence rows = Sequence::of(p.q_layout, head / p.num_heads);
  const int h = head % p.num_heads, lane = threadIdx.x % kLanes;
  const auto* out = static_cast<const uint16_t*>(p.out.data) + p.out.offset(rows, h);
  const auto* dout = static_cast<const uint16_t*>(p.dout.data) + p.dout.offset(rows, h);
  const auto* lse = static_cast<const float*>(p.lse.data) + p.lse.offset(rows, h);
  const auto* dlse =
      p.dlse.data ? static_cast<const float*>(p.dlse.data) + p.dlse.offset(rows, h) : nullptr;
  for (int i = threadIdx.x / kLanes; i < kBlockM; i += blockDim.x / kLanes) {
    const int query = m_block * kBlockM + i;
    float delta = 0.f, row_lse = INFINITY;
    if (query < rows.length) {
      if (lane * 8 < p.head_dim_v) {
        const uint4 a = reinterpret_cast<const uint4*>(out + query * p.out.row_stride)[lane];
        const uint4 b = reinterpret_cast<const uint4*>(dout + query * p.dout.row_stride)[lane];
        const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 u = unpack<Element>(x[j]), v = unpack<Element>(y[j]);
          delta += u.x * v.x + u.y * v.y;
        }
      }
      if (!isinf(lse[query])) row_lse = lse[query] * (Traits::kGeneral ? 1.f : 1.4426950408889634f);
    }
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
      delta += __shfl_xor_sync(0xffffffffu, delta, offset);
    if (lane == 0) {
      if (dlse && query < rows.length) delta -= dlse[query];
      schedule.lse_log2[block * kBlockM + i] = row_lse;
      // Of a row without keys neither out nor its gradients exist, whatever dlse is.
      schedule.delta[block * kBlockM + i] = row_lse == INFINITY ? 0.f : delta;
    }
  }
}

}  // namespace flash::cuda::sm90
