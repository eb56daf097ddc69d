// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "cuda/sm90/sequence_order.h"
#include "primitives/device.cuh"
#include "primitives/ptx/tma.cuh"

namespace flash::cuda::sm90 {

constexpr int kOrderThreads = 1024;

/// The sum of `value` over the threads before this one, and over all of them.
FLASH_DEVICE int sum_before(int value, int& total, int (&warp_sums)[kOrderThreads / 32]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += other;
  }
  __syncthreads();  // the sums of an earlier call have been read
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int before = sum - value;
  total = 0;
  for (int w = 0; w < kOrderThreads / 32; ++w) {
    if (w < warp) before += warp_sums[w];
    total += warp_sums[w];
  }
  return before;
}

/// One CTA: a counting sort by the number of keys, in as many classes as there are threads, then
/// the sums of the blocks of queries.
__global__ void __launch_bounds__(kOrderThreads)
    order_sequences_kernel(SequenceLayout q_layout, SequenceLayout k_layout, int batch,
                           int block_queries, SequenceOrder order, unsigned* next_tile) {
  __shared__ int place[kOrderThreads], warp_sums[kOrderThreads / 32];
  ptx::launch_next_grid();  // the forward may set itself up
  if (threadIdx.x == 0) *next_tile = 0;

  const auto class_of = [&](int b) {
    constexpr int kLast = kOrderThreads - 1;
    const int length = Sequence::of(k_layout, b).length;
    return kLast - int(int64_t{length} * kLast / max(k_layout.max, 1));
  };
  place[threadIdx.x] = 0;
  __syncthreads();
  for (int b = threadIdx.x; b < batch; b += kOrderThreads) atomicAdd(&place[class_of(b)], 1);
  __syncthreads();
  int total;
  place[threadIdx.x] = sum_before(place[threadIdx.x], total, warp_sums);
  __syncthreads();
  for (int b = threadIdx.x; b < batch; b += kOrderThreads)
    order.batch[atomicAdd(&place[class_of(b)], 1)] = b;
  __syncthreads();

  int blocks = 0;
  for (int begin = 0; begin < batch; begin += kOrderThreads) {
    const int rank = begin + int(threadIdx.x);
    const int length = rank < batch ? Sequence::of(q_layout, order.batch[rank]).length : 0;
    const int before = sum_before((length + block_queries - 1) / block_queries, total, warp_sums);
    if (rank < batch) order.first_block[rank] = blocks + before;
    blocks += total;
  }
  if (threadIdx.x == 0) order.first_block[batch] = blocks;
}

}  // namespace flash::cuda::sm90
