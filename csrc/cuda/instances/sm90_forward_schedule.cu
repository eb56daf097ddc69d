// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/launch.cuh"
#include "cuda/sm90/key_runs.cuh"
#include "cuda/sm90/sequence_order.cuh"

namespace flash::cuda::sm90 {

void find_key_runs(const ForwardParams& p, const KeyRuns& runs, void* stream) {
  FLASH_CUDA_CHECK(
      cudaMemsetAsync(runs.count, 0, 2 * sizeof(int), static_cast<cudaStream_t>(stream)));
  const int heads = runs.head_stride == 0 ? 1 : p.num_heads;
  const int batch = runs.batch_stride == 0 ? 1 : p.batch;
  launch(key_runs_kernel, int64_t{heads} * batch, 1024, 0, stream, p.features.score_mod.mask,
         p.k_layout.max, heads, runs);
}

void order_sequences(const ForwardParams& p, int block_queries, const SequenceOrder& order,
                     unsigned* next_tile, void* stream) {
  launch(order_sequences_kernel, 1, kOrderThreads, 0, stream, p.q_layout, p.k_layout, p.batch,
         block_queries, order, next_tile);
}

}  // namespace flash::cuda::sm90
