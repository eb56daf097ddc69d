// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/sm90/forward.cuh"
#include "cuda/sm90/support.h"
#include "cuda/sm90/tensor_map.h"

namespace flash::cuda::sm90 {

/// Causal tiles differ in work: heavy first, from a counter, in sections of heads. Sections of 4 MB
/// of K and V gain up to 12 % at 512 tokens and lose beyond 1k; 48 MB gain 2-11 % from 2k. So do
/// tiles cut to runs, of which only the general ones, with more work elsewhere, keep a fixed order.
template <class Traits>
ForwardSchedule make_schedule(const ForwardParams& p, void* workspace) {
  ForwardSchedule schedule{};
  schedule.num_m_blocks = (p.q_layout.max + Traits::kBlockM - 1) / Traits::kBlockM;
  schedule.num_tiles = schedule.num_m_blocks * p.num_heads * p.batch;
  schedule.heavy_first = is_causal(p) || is_ragged(p);
  if (has_key_runs(p)) {
    schedule.runs = key_runs(p, workspace);
    schedule.taken = !Traits::kGeneral   ? RunsTaken::kWhole
                     : runs_are_plain(p) ? RunsTaken::kWithHoles
                                         : RunsTaken::kAll;
  }
  if (schedule.heavy_first || (schedule.runs.run && !Traits::kGeneral))
    schedule.next_tile = static_cast<unsigned*>(workspace);
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
  const ForwardSchedule schedule = make_schedule<Traits>(p, workspace);
  if (schedule.next_tile)
    FLASH_CUDA_CHECK(cudaMemsetAsync(schedule.next_tile, 0, sizeof *schedule.next_tile,
                                     static_cast<cudaStream_t>(stream)));
  PairTiles pairs{};
  if constexpr (Traits::kGeneral) pairs = make_pair_tiles(p, Traits::kBlockM, Traits::kBlockN);
  const SequenceLayout keys = schedule.runs.run ? cut_to_runs(p.k_layout) : p.k_layout;
  const ForwardMaps maps{
      make_tma_tensor(p, p.q, p.q_layout, p.num_heads, p.head_dim, Traits::kBlockM),
      make_tma_tensor(p, p.k, keys, p.num_heads_k, p.head_dim, Traits::kBlockN),
      make_tma_tensor(p, p.v, keys, p.num_heads_k, p.head_dim_v, Traits::kBlockN),
      make_tma_tensor(p, p.out, p.q_layout, p.num_heads, p.head_dim_v, 64), pairs};
  launch(forward_kernel<Traits>, std::min(schedule.num_tiles, num_multiprocessors()),
         Traits::kThreads, sizeof(typename Traits::SharedStorage), stream, maps, p, schedule);
}

/// Element of the call; the rows of the tile table are the caller's choice.
template <int kHeadDim, class Tile, Variant kVariant = Variant::kPlain>
void launch_forward_tile(const ForwardParams& p, void* workspace, void* stream) {
  if (p.dtype == DType::kBFloat16) {
    launch_forward_traits<ForwardTraits<__nv_bfloat16, kHeadDim, Tile, kVariant>>(p, workspace,
                                                                                  stream);
  } else {
    launch_forward_traits<ForwardTraits<__half, kHeadDim, Tile, kVariant>>(p, workspace, stream);
  }
}

/// Whether scores are products, of which at most a mask drops some that comes as tiles. The length
/// decides, not the strides: that of the batch is free for one sequence, and a row's bits must not
/// depend on how many there are.
inline bool scores_are_products(const ForwardParams& p) {
  const ScoreMod& mod = p.features.score_mod;
  return p.softmax_scale > 0 && !mod.has_softcap() && !mod.bias.data && !mod.alibi_slopes &&
         !p.features.sink.enabled() &&
         (!mod.mask.data || (p.k_layout.max % 16 == 0 && pairs_in_tiles(p) == PairKind::kMask));
}

/// Tiles of the general variant; those that a mask only cuts to a run of keys, plain.
template <int kHeadDim, class Tile, class ProductsTile = void>
void launch_forward_general(const ForwardParams& p, void* workspace, void* stream) {
  if (has_key_runs(p)) {
    find_key_runs(p, key_runs(p, workspace), stream);
    if (runs_are_plain(p)) launch_forward<kHeadDim, Variant::kPlain>(p, workspace, stream);
  }
  if constexpr (!std::is_void_v<ProductsTile>)
    if (scores_are_products(p))
      return launch_forward_tile<kHeadDim, ProductsTile, Variant::kGeneral>(p, workspace, stream);
  launch_forward_tile<kHeadDim, Tile, Variant::kGeneral>(p, workspace, stream);
}

}  // namespace flash::cuda::sm90
