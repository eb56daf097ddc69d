// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/sm90/forward.cuh"
#include "cuda/sm90/support.h"
#include "cuda/sm90/tensor_map.h"

namespace flash::cuda::sm90 {

/// Query heads of one key head whose rows share tiles, a power of 2. For sequences of at most half
/// a tile of queries: K and V are read once for all these heads. (Longer ones, where that makes
/// fewer tiles: 0 to +7 %; but then a row's bits would depend on more than a range of lengths.)
template <class Traits>
int shared_heads_log2(const ForwardParams& p) {
  if (Traits::kGeneral || has_key_runs(p) || p.q_layout.max > Traits::kBlockM / 2) return 0;
  int log2 = 0;  // no more than the rows of a warpgroup, which leave by one store
  while (log2 < 6 && p.gqa_ratio() % (2 << log2) == 0) ++log2;
  return log2;
}

/// Sections of 4 MB of K and V gain up to 12 % at 512 tokens and lose beyond 1k; 48 MB gain 2-11 %
/// from 2k. Tiles are drawn from a counter where they differ in work and are more than cores, tiles
/// cut to runs too; of those only the general ones, with more work elsewhere, keep a fixed order.
template <class Traits>
ForwardSchedule make_schedule(const ForwardParams& p, void* workspace) {
  ForwardSchedule schedule{};
  const int log2_heads = shared_heads_log2<Traits>(p);
  const int heads = p.num_heads >> log2_heads;
  const int64_t m_blocks = ceil_div(int64_t{p.q_layout.max} << log2_heads, Traits::kBlockM);
  int64_t blocks = m_blocks * p.batch;
  if (p.q_layout.packed())
    blocks = std::min(blocks, (p.q_layout.total << log2_heads) / Traits::kBlockM + p.batch);
  schedule.num_tiles = int(blocks * heads);
  if (schedule.num_tiles == 0) return schedule;
  schedule.log2_heads = log2_heads;
  schedule.num_m_blocks = Divisor(int(m_blocks));
  schedule.heads = Divisor(heads);
  schedule.gqa_ratio = Divisor(p.gqa_ratio());
  schedule.order = sequence_order(p, workspace);
  schedule.heavy_first = is_causal(p) && !schedule.order.batch;
  if (has_key_runs(p)) {
    schedule.runs = key_runs(p, workspace);
    schedule.taken = !Traits::kGeneral   ? RunsTaken::kWhole
                     : runs_are_plain(p) ? RunsTaken::kWithHoles
                                         : RunsTaken::kAll;
  }
  const bool is_uneven = schedule.heavy_first || (schedule.runs.run && !Traits::kGeneral);
  if (schedule.order.batch || (is_uneven && schedule.num_tiles > num_multiprocessors()))
    schedule.next_tile = static_cast<unsigned*>(workspace);
  const int64_t short_section = Traits::kHeadDim == 128 ? 1024 : 512;
  const int64_t section_bytes = int64_t{p.k_layout.max <= short_section ? 4 : 48} << 20;
  const int64_t head_bytes = int64_t{2} * std::max(p.k_layout.max, 1) * (p.head_dim + p.head_dim_v);
  const int64_t all_heads = int64_t{heads} * (schedule.order.batch ? 1 : p.batch);
  const int group = p.gqa_ratio() >> log2_heads;  // as numbered
  const int section =
      int(std::clamp<int64_t>(section_bytes / head_bytes, 1, all_heads / group)) * group;
  schedule.section = Divisor(section);
  schedule.section_blocks = Divisor(int(section * m_blocks));
  schedule.last_section = Divisor(all_heads % section == 0 ? section : int(all_heads % section));
  return schedule;
}

template <class Traits>
void launch_forward_traits(const ForwardParams& p, void* workspace, void* stream) {
  constexpr int kBlockM = Traits::kBlockM;
  const ForwardSchedule schedule = make_schedule<Traits>(p, workspace);
  if (schedule.num_tiles == 0) return;
  PairTiles pairs{};
  if constexpr (Traits::kGeneral) pairs = make_pair_tiles(p, kBlockM, Traits::kBlockN);
  const SequenceLayout keys = schedule.runs.run ? cut_to_runs(p.k_layout) : p.k_layout;
  const int log2_heads = schedule.log2_heads;
  const ForwardMaps maps{
      make_tma_tensor(p, p.q, p.q_layout, p.num_heads, p.head_dim, kBlockM, log2_heads),
      make_tma_tensor(p, p.k, keys, p.num_heads_k, p.head_dim, Traits::kBlockN),
      make_tma_tensor(p, p.v, keys, p.num_heads_k, p.head_dim_v, Traits::kBlockN),
      make_tma_tensor(p, p.out, p.q_layout, p.num_heads, p.head_dim_v, 64, log2_heads), pairs};
  const int ctas = std::min(schedule.num_tiles, num_multiprocessors());
  constexpr size_t kSharedBytes = sizeof(typename Traits::SharedStorage);
  if (schedule.order.batch) {
    order_sequences(p, kBlockM >> log2_heads, schedule.order, schedule.next_tile, stream);
    return launch_early(forward_kernel<Traits>, ctas, Traits::kThreads, kSharedBytes, stream, maps,
                        p, schedule);
  }
  if (schedule.next_tile)
    FLASH_CUDA_CHECK(cudaMemsetAsync(schedule.next_tile, 0, sizeof *schedule.next_tile,
                                     static_cast<cudaStream_t>(stream)));
  launch(forward_kernel<Traits>, ctas, Traits::kThreads, kSharedBytes, stream, maps, p, schedule);
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
