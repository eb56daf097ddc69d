// SPDX-License-Identifier: BSD-3-Clause
// lse and delta of every row of queries: by the converting warps of the fused kernel, head by head,
// or by a kernel before the main ones.
#pragma once

#include <bit>

#include "cuda/sm90/backward_load.cuh"
#include "primitives/numeric.cuh"
#include "primitives/ptx/shared_memory.cuh"

namespace flash::cuda::sm90 {

/// sum + a . b, 8 elements each.
template <class Element>
FLASH_DEVICE float add_product(float sum, const uint32_t (&a)[4], const uint32_t (&b)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 u = unpack<Element>(a[j]), v = unpack<Element>(b[j]);
    sum += u.x * v.x + u.y * v.y;
  }
  return sum;
}

/// Sum over each kLanes neighbouring lanes.
template <int kLanes>
FLASH_DEVICE float sum_over_lanes(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

/// What the rows of queries of one sequence and head bring along.
struct RowInputs {
  const float *lse, *dlse;
  int length;

  FLASH_DEVICE RowInputs(const BackwardParams& p, const Sequence& rows, int head)
      : lse(static_cast<const float*>(p.lse.data) + p.lse.offset(rows, head)),
        dlse(p.dlse.data ? static_cast<const float*>(p.dlse.data) + p.dlse.offset(rows, head)
                         : nullptr),
        length(rows.length) {}

  FLASH_DEVICE float lse_of(int query) const { return query < length ? lse[query] : INFINITY; }
};

/// lse log2 e (general variant: lse) and delta = rowsum(dO o O) - dLSE of one row, to place `at`.
/// Rows that keep nothing (an infinite lse) get +inf: P = 0. Neither out nor its gradients exist
/// there, whatever dlse is.
template <class Traits>
FLASH_DEVICE void put_row(const BackwardSchedule& schedule, const RowInputs& inputs, int64_t at,
                          int query, float lse, float out_dot_dout) {
  const bool is_kept = !isinf(lse);
  if (is_kept && inputs.dlse) out_dot_dout -= inputs.dlse[query];
  schedule.lse_log2[at] = is_kept ? lse * (Traits::kGeneral ? 1.f : 1.4426950408889634f) : INFINITY;
  schedule.delta[at] = is_kept ? out_dot_dout : 0.f;
}

/// O and dO of half a block of queries, to the memory of a converting warp.
template <class Traits>
FLASH_DEVICE void fetch_half(const BackwardMaps& maps, const BackwardParams& p,
                             const BackwardSchedule& schedule,
                             typename Traits::SharedStorage& shared, int head_index, int m_block,
                             int half) {
  constexpr int kRows = Traits::kBlockM / 2, kElements = kRows * Traits::kChunks * 64;
  if (threadIdx.x % 32 != 0) return;
  const auto [batch, head] = schedule.heads.divide(head_index);
  const Sequence rows = Sequence::of(p.q_layout, batch);
  const int row = m_block * Traits::kBlockM + half * kRows;
  const auto* tile = reinterpret_cast<const uint16_t*>(shared.converted[half]);
  uint64_t* full = &shared.converted_full[half];
  ptx::mbarrier_expect_bytes(full, 2 * kElements * 2);
  load_rows<Traits::kChunks>(maps.half_out, tile, full, kRows, rows, row, head, ptx::kEvictFirst);
  load_rows<Traits::kChunks>(maps.half_dout, tile + kElements, full, kRows, rows, row, head,
                             ptx::kEvictLast);
}

/// Their lse and delta. Eight lanes have a row; both tiles are swizzled alike.
template <class Traits>
FLASH_DEVICE void prepare_half(const BackwardParams& p, const BackwardSchedule& schedule,
                               const typename Traits::SharedStorage& shared, int head_index,
                               int m_block, int half) {
  constexpr int kRows = Traits::kBlockM / 2, kElements = kRows * Traits::kChunks * 64;
  const int lane = threadIdx.x % 32;
  const auto [batch, head] = schedule.heads.divide(head_index);
  const RowInputs inputs(p, Sequence::of(p.q_layout, batch), head);
  const uint32_t place = shared_address(shared.converted[half]) + lane * 16;
  const int first = m_block * Traits::kBlockM + half * kRows + lane % 8 * 4 + lane / 8;
#pragma unroll 1
  for (int j = 0; j < kRows / 32; ++j) {
    float mine = 0.f;  // of row 4 (lane % 8) + lane / 8
#pragma unroll 2
    for (int i = 0; i < 8; ++i) {
      float sum = 0.f;
#pragma unroll
      for (int c = 0; c < Traits::kChunks; ++c) {
        const uint32_t at = place + (c * kRows + j * 32 + i * 4) * 128;
        uint32_t out[4], dout[4];
        ptx::load_shared_v4(out, at);
        ptx::load_shared_v4(dout, at + kElements * 2);
        sum = add_product<typename Traits::Element>(sum, out, dout);
      }
      sum = sum_over_lanes<8>(sum);
      if (lane % 8 == i) mine = sum;
    }
    const int query = first + j * 32;
    put_row<Traits>(schedule, inputs,
                    int64_t{head_index} * schedule.num_m_blocks.value() * Traits::kBlockM + query,
                    query, inputs.lse_of(query), mine);
  }
}

/// lse, delta, and zeros in the sums of dQ (if there are any) and in the counters. One CTA per
/// block of queries and head.
template <class Traits>
__global__ void __launch_bounds__(256)
    prepare_kernel(const __grid_constant__ BackwardParams p,
                   const __grid_constant__ BackwardSchedule schedule) {
  constexpr int kBlockM = Traits::kBlockM;
  constexpr int kLanes = std::bit_ceil(unsigned(Traits::kChunksV) * 8);   // of 8 columns
  const auto [head, m_block] = schedule.num_m_blocks.divide(blockIdx.x);  // of the whole batch
  const int64_t block = blockIdx.x;
  ptx::launch_next_grid();  // which may set itself up
  if (block == 0 && threadIdx.x == 0) *schedule.drawn = {};
  if constexpr (Traits::kSumsDq) {
    if (head < schedule.dq_slots.value()) {
      auto* sums = reinterpret_cast<float4*>(schedule.dq_sums + block * Traits::kDqSize);
      for (int i = threadIdx.x; i < Traits::kDqSize / 4; i += blockDim.x) sums[i] = float4{};
      if (threadIdx.x == 0) {
        schedule.arrivals[block] = 0;
        if (m_block == 0) schedule.opened[head] = 0;
      }
    }
  }
  const auto [batch, h] = schedule.heads.divide(head);
  const Sequence rows = Sequence::of(p.q_layout, batch);
  const int lane = threadIdx.x % kLanes;
  const auto* out = static_cast<const uint16_t*>(p.out.data) + p.out.offset(rows, h);
  const auto* dout = static_cast<const uint16_t*>(p.dout.data) + p.dout.offset(rows, h);
  const RowInputs inputs(p, rows, h);
  for (int i = threadIdx.x / kLanes; i < kBlockM; i += blockDim.x / kLanes) {
    const int query = m_block * kBlockM + i;
    float sum = 0.f;
    if (query < rows.length && lane * 8 < p.head_dim_v) {
      const uint4 a = reinterpret_cast<const uint4*>(out + query * p.out.row_stride)[lane];
      const uint4 b = reinterpret_cast<const uint4*>(dout + query * p.dout.row_stride)[lane];
      sum = add_product<typename Traits::Element>(sum, {a.x, a.y, a.z, a.w}, {b.x, b.y, b.z, b.w});
    }
    sum = sum_over_lanes<kLanes>(sum);
    if (lane == 0)
      put_row<Traits>(schedule, inputs, block * kBlockM + i, query, inputs.lse_of(query), sum);
  }
}

}  // namespace flash::cuda::sm90
