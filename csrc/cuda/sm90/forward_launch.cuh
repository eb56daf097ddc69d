// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/sm90/forward.cuh"
#include "cuda/sm90/support.h"
#include "cuda/sm90/tensor_map.h"

namespace flash::cuda::sm90 {

/// Causal tiles differ in work: heavy first, from a counter, in sections of heads. Sections of 4 MB
/// of K and V gain up to 12 % at 512 tokens and lose beyond 1k; 48 MB gain 2-11 % from 2k.
template <class Traits>
ForwardSchedule make_schedule(const ForwardParams& p, unsigned* counter) {
  ForwardSchedule schedule{};
  schedule.num_m_blocks = (p.q_layout.max + Traits::kBlockM - 1) / Traits::kBlockM;
  schedule.num_tiles = schedule.num_m_blocks * p.num_heads * p.batch;
  schedule.heavy_first = is_causal(p);
  schedule.next_tile = schedule.heavy_first ? counter : nullptr;
  const int64_t short_section = Traits::kHeadDim == 128 ? 1024 : 512;
  const int64_t section_bytes = int64_t{p.k_layout.max <= short_section ? 4 : 48} << 20;
  const int64_t head_bytes = int64_t{2} * std::max(p.k_layout.max, 1) * (p.head_dim + p.head_dim_v);
  schedule.section_heads =
      int(std::clamp<int64_t>(section_bytes / head_bytes, 1, p.num_heads_k * int64_t{p.batch})) *
      p.gqa_ratio();
  return schedule;
}

template <class Traits>
void launch_forward_traits(const ForwardParams& p, void* workspace, void* stream) {
  const auto counter = static_cast<unsigned*>(workspace);
  const ForwardSchedule schedule = make_schedule<Traits>(p, counter);
  if (schedule.next_tile)
    FLASH_CUDA_CHECK(
        cudaMemsetAsync(counter, 0, sizeof *counter, static_cast<cudaStream_t>(stream)));
  const TensorShape q{p.batch, p.num_heads, p.q_layout.max, p.head_dim};
  const TensorShape k{p.batch, p.num_heads_k, p.k_layout.max, p.head_dim};
  const TensorShape v{p.batch, p.num_heads_k, p.k_layout.max, p.head_dim_v};
  const TensorShape out{p.batch, p.num_heads, p.q_layout.max, p.head_dim_v};
  const ForwardMaps maps{make_tensor_map(p.dtype, p.q, q, Traits::kBlockM),
                         make_tensor_map(p.dtype, p.k, k, Traits::kBlockN),
                         make_tensor_map(p.dtype, p.v, v, Traits::kBlockN),
                         make_tensor_map(p.dtype, p.out, out, 64)};
  launch(forward_kernel<Traits>, std::min(schedule.num_tiles, num_multiprocessors()),
         Traits::kThreads, sizeof(typename Traits::SharedStorage), stream, maps, p, schedule);
}

/// Element of the call; the rows of the tile table are the caller's choice.
template <int kHeadDim, class Tile>
void launch_forward_tile(const ForwardParams& p, void* workspace, void* stream) {
  if (p.dtype == DType::kBFloat16) {
    launch_forward_traits<ForwardTraits<__nv_bfloat16, kHeadDim, Tile>>(p, workspace, stream);
  } else {
    launch_forward_traits<ForwardTraits<__half, kHeadDim, Tile>>(p, workspace, stream);
  }
}

}  // namespace flash::cuda::sm90
