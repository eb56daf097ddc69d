// SPDX-License-Identifier: BSD-3-Clause
// dK and dV where dQ has a kernel of its own. A tile is 64 keys of one key head, against all blocks
// of queries of its query heads that see one of them. At head dim 256, dV and dK fill half the
// registers of a warpgroup each, so the products are split by what they make:
//   warpgroup 1:  dV += P^T dO of the last block;   S = K Q^T,   P = exp(S - lse), to shared memory
//   warpgroup 2:  dK += dS^T Q of the last block;  dP = V dO^T, dS = P o (dP - delta)
// One is at its arithmetic while the other's products run: P, which 1 makes and 2 waits for, keeps
// them half a step apart. P goes from thread to thread: both hold the same elements of a block.
// General variant: 1 makes the scores and hands over P o slope, negative where dropped; dS, which
// is linear in P, needs no more.
#pragma once

#include "cuda/sm90/backward_load.cuh"
#include "cuda/sm90/backward_mma.cuh"
#include "cuda/sm90/backward_scores.cuh"
#include "cuda/sm90/backward_separate_traits.cuh"
#include "primitives/ptx/ldmatrix.cuh"

namespace flash::cuda::sm90 {

/// The first kHeld depth steps of this warp's rows of K or V, as A fragments.
template <int kHeld, int kRows>
FLASH_DEVICE void hold_rows(uint32_t (&held)[4 * kHeld], const uint16_t* tile, int warp) {
  const int lane = threadIdx.x & 31, row = warp * 16 + (lane & 15);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int unit = (i % 4 * 2 + lane / 16) ^ (row & 7);
    ldmatrix_x4(reinterpret_cast<uint32_t (&)[4]>(held[4 * i]),
                shared_address(tile) + i / 4 * kRows * 128 + row * 128 + unit * 16);
  }
}

/// acc[64 x kRowsB] (+)= A B^T over kSteps depth steps of A, `first` and on, B a whole tile; one
/// group. Of A, the first kHeld steps are in registers.
template <class Element, int kSteps, int kRowsA, int kRowsB, int kHeld>
FLASH_DEVICE void issue_held_by_rows(float (&acc)[kRowsB / 2], uint32_t (&held)[4 * kHeld],
                                     uint32_t rows_a, const uint16_t* rows_b, int first) {
  constexpr uint64_t kLayout = ptx::descriptor_layout(16, 1024);
  const uint64_t a = ptx::descriptor(kLayout, rows_a);
  const uint64_t b = ptx::descriptor(kLayout, shared_address(rows_b));
  using Product = ptx::Wgmma<Element, kRowsB>;
  ptx::pin(acc);
  ptx::pin(held);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int step = first + i;
    const uint64_t b_step = ptx::advance(b, ptx::k_major_step(i, kRowsB));
    if (step < kHeld) {
      Product::template rs<0>(acc, &held[4 * step], b_step, step > 0);
    } else {
      Product::template ss<0, 0>(acc, ptx::advance(a, ptx::k_major_step(step, kRowsA)), b_step,
                                 step > 0);
    }
  }
  ptx::wgmma_commit();
}

enum class KeyGradient { kValues, kKeys };  // what a warpgroup makes: dV or dK

template <class Traits, KeyGradient kMakes>
struct KeysCompute {
  using Element = typename Traits::Element;
  using Shared = typename Traits::SharedStorage;
  static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  static constexpr int kParts = Traits::kQueryParts;
  static_assert(kParts == 1 || kParts == 2, "finish_gradient() waits for one or two groups");
  static constexpr bool kMakesDv = kMakes == KeyGradient::kValues;
  static constexpr int kDepth = kMakesDv ? Traits::kHeadDim : Traits::kHeadDimV;  // of S or dP
  static constexpr int kHeld = Traits::kHeldSteps < kDepth / 16 ? Traits::kHeldSteps : kDepth / 16;
  static constexpr int kColumns = kMakesDv ? Traits::kHeadDimV : Traits::kHeadDim;

  const BackwardParams& p;
  const BackwardSchedule& schedule;
  Shared& shared;
  const int lane, warp;
  const float scale_log2;
  const uint32_t p_at;  // this thread's P^T

  float acc[kColumns / 2];         // dV or dK
  uint32_t held[4 * kHeld];        // of K or V
  uint32_t fragment[kBlockM / 4];  // P^T or dS^T of the last block
  // dV takes dO, and dK takes Q, a block later than dP and S.
  Ring<Traits::kQuerySlots> queries;
  Ring<Traits::kStages> dout;
  int p_parity = 0;
  int key;           // first of this thread's two
  KeptColumns kept;  // queries that they keep
  // General variant:
  const BackwardMaps& maps;
  const bool hides_keys;  // kept is of one query head
  Ring<Traits::kPairStages> pair_ring;
  BackwardScores<Traits, BlockRows::kKeys> scores;

  FLASH_DEVICE KeysCompute(const BackwardMaps& tensors, const BackwardParams& params,
                           const BackwardSchedule& s, Shared& storage)
      : p(params),
        schedule(s),
        shared(storage),
        lane(threadIdx.x & 31),
        warp(warp_uniform((threadIdx.x >> 5) & 3)),
        scale_log2(static_cast<float>(params.softmax_scale * 1.4426950408889634)),
        p_at(shared_address(storage.p) + (threadIdx.x & 127) * 16),
        maps(tensors),
        hides_keys(Traits::kGeneral && has_unattended_keys(params)),
        scores{params} {}

  /// dV += P^T dO of the last block, one group; or dK += dS^T Q, a group for each part of Q.
  FLASH_DEVICE void issue_gradient() {
    if constexpr (kMakesDv) {
      ptx::mbarrier_wait(&shared.dout_full[dout.stage], dout.parity);
      issue_fragment_by_rows<Element, kColumns, kBlockM>(acc, fragment, shared.dout[dout.stage]);
    } else {
      Ring<Traits::kQuerySlots> part = queries;
#pragma unroll
      for (int i = 0; i < kParts; ++i, part.advance()) {
        ptx::mbarrier_wait(&shared.q_full[part.stage], part.parity);
        issue_fragment_by_rows<Element, kColumns / kParts, kBlockM>(
            reinterpret_cast<float (&)[kColumns / kParts / 2]>(acc[i * (kColumns / kParts / 2)]),
            fragment, shared.q[part.stage]);
      }
    }
  }
  /// Waits for it, with kPending groups queued behind it, and gives dO or Q back.
  template <int kPending>
  FLASH_DEVICE void finish_gradient() {
    if constexpr (kMakesDv) {
      ptx::wgmma_wait<kPending>();
      ptx::pin(acc), ptx::pin(fragment);
      release(&shared.dout_empty[dout.stage]);
      dout.advance();
    } else {
      if constexpr (kParts == 2) {
        ptx::wgmma_wait<kPending + 1>();
        release(&shared.q_empty[queries.stage]);
        queries.advance();
      }
      ptx::wgmma_wait<kPending>();
      ptx::pin(acc), ptx::pin(fragment);
      release(&shared.q_empty[queries.stage]);
      queries.advance();
    }
  }

  /// S^T, P^T.
  template <bool kIsFirst>
  FLASH_DEVICE void make_weights(int m_block, bool is_masked, bool is_last) {
    float accS[kBlockM / 2];
    Ring<Traits::kQuerySlots> part = queries;
#pragma unroll
    for (int i = 0; i < kParts; ++i, part.advance()) {
      ptx::mbarrier_wait(&shared.q_full[part.stage], part.parity);
      issue_held_by_rows<Element, kDepth / 16 / kParts, kBlockN, kBlockM, kHeld>(
          accS, held, shared_address(shared.k), shared.q[part.stage], i * kDepth / 16 / kParts);
    }
    if constexpr (!kIsFirst) finish_gradient<kParts>();
    ptx::wgmma_wait<0>();
    ptx::pin(accS), ptx::pin(held);
    if (is_last) release(&shared.k_empty);
    if constexpr (Traits::kGeneral) {
      make_general_weights(accS, m_block, is_masked);
    } else {
      if (is_masked) mask_scores<kBlockM>(kept, accS, m_block);
      probabilities<kBlockM>(accS, scale_log2, shared.lse_log2[queries.stage]);
#pragma unroll
      for (int i = 0; i < kParts; ++i, queries.advance()) release(&shared.q_empty[queries.stage]);
      to_fragment<Element>(fragment, accS);
      put_weights(fragment);
    }
  }
  /// P^T, and to shared memory P^T o slope, negative where dropped.
  FLASH_DEVICE void make_general_weights(float (&accS)[kBlockM / 2], int m_block, bool is_masked) {
    uint32_t slopes[kBlockM / 4];
    const int query = m_block * kBlockM + (lane & 3) * 2;
    with_pair_tile(maps.pairs, shared.pairs, pair_ring, [&](uint32_t tile) {
      scores.modify(accS, key, query, {maps.pairs.kind, tile, warp * 16, 0}, slopes);
    });
    if (is_masked || hides_keys) mask_scores<kBlockM>(kept, accS, m_block);
    scores.weights(fragment, accS, ColumnValues(shared.lse_log2[queries.stage]));
#pragma unroll
    for (int i = 0; i < kParts; ++i, queries.advance()) release(&shared.q_empty[queries.stage]);
    if (scores.has_dropout()) scores.mark_dropped(fragment, key, query);
    if (scores.has_slopes()) {
#pragma unroll
      for (int i = 0; i < kBlockM / 4; ++i) slopes[i] = scores.scaled(fragment[i], slopes[i]);
      put_weights(slopes);
    } else {
      put_weights(fragment);
    }
    if (scores.has_dropout()) scores.drop_marked(fragment);
  }
  FLASH_DEVICE void put_weights(const uint32_t (&weights)[kBlockM / 4]) const {
    ptx::mbarrier_wait(&shared.p_empty, p_parity ^ 1);
#pragma unroll
    for (int i = 0; i < kBlockM / 16; ++i) ptx::store_shared_v4(p_at + i * 2048, &weights[4 * i]);
    release(&shared.p_full);
  }

  /// dP^T, dS^T.
  template <bool kIsFirst>
  FLASH_DEVICE void make_scores_gradient(bool is_last) {
    float accdP[kBlockM / 2];
    ptx::mbarrier_wait(&shared.dout_full[dout.stage], dout.parity);
    issue_held_by_rows<Element, kDepth / 16, kBlockN, kBlockM, kHeld>(
        accdP, held, shared_address(shared.v), shared.dout[dout.stage], 0);
    if constexpr (!kIsFirst) finish_gradient<1>();
    ptx::wgmma_wait<0>();
    ptx::pin(accdP), ptx::pin(held);
    if (is_last) release(&shared.v_empty);
    ptx::mbarrier_wait(&shared.p_full, p_parity);
#pragma unroll
    for (int i = 0; i < kBlockM / 16; ++i) {
      uint32_t rP[4];
      ptx::load_shared_v4(rP, p_at + i * 2048);
      float (&part)[8] = reinterpret_cast<float (&)[8]>(accdP[8 * i]);
      const float* delta = shared.delta[dout.stage] + 16 * i;
      if constexpr (Traits::kGeneral) {
        scores.gradient(rP, part, ColumnValues(delta));
      } else {
        scores_gradient_16<Element, 16>(rP, part, delta);
      }
    }
    release(&shared.p_empty);
    release(&shared.dout_empty[dout.stage]);
    dout.advance();
    to_fragment<Element>(fragment, accdP);
  }

  template <bool kIsFirst>
  FLASH_DEVICE void step(int m_block, bool is_masked, bool is_last) {
    if constexpr (!kIsFirst) issue_gradient();
    if constexpr (kMakesDv) {
      make_weights<kIsFirst>(m_block, is_masked, is_last);
    } else {
      make_scores_gradient<kIsFirst>(is_last);
    }
    p_parity ^= 1;
  }

  /// All blocks of queries of one query head: masked, full, masked. Only P knows of the mask.
  FLASH_DEVICE void run_head(const BackwardTileId& tile, bool is_last_head) {
    const int full_begin = to_uniform(tile.full.begin), full_end = to_uniform(tile.full.end);
    const int begin = to_uniform(tile.visit.begin), end = to_uniform(tile.visit.end);
    const auto is_last = [&](int m_block) { return is_last_head && m_block + 1 == end; };
    int m_block = begin;
    step</*kIsFirst=*/true>(m_block, m_block < full_begin || m_block >= full_end, is_last(m_block));
    ++m_block;
    if constexpr (kMakesDv && !Traits::kGeneral) {  // general: one loop, for its code is long
#pragma unroll 1
      for (; m_block < full_begin; ++m_block) step<false>(m_block, true, is_last(m_block));
#pragma unroll 1
      for (; m_block < full_end; ++m_block) step<false>(m_block, false, is_last(m_block));
    }
#pragma unroll 1
    for (; m_block < end; ++m_block)
      step<false>(m_block, !Traits::kGeneral || m_block < full_begin || m_block >= full_end,
                  is_last(m_block));
    issue_gradient();
    finish_gradient<0>();
  }

  /// Query head g of a tile. A key that it does not attend keeps nothing, whatever lies there.
  FLASH_DEVICE void begin_head(const BackwardTileId& tile, int g) {
    scores.begin_head(tile.batch, tile.head_k * p.gqa_ratio() + g, tile.q, tile.k);
    if (!hides_keys) return;
    kept = KeptColumns(p.mask_of(tile.q, tile.k).transposed(), key);
    const AttendedKeys<Element, Variant::kGeneral> attended{p.features.score_mod, scores.batch,
                                                            scores.head};
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (key + 8 * r < scores.seqlen_k && !attended(key + 8 * r)) kept.of_row[r] = {0, 0};
  }

  FLASH_DEVICE void run() {
    Ring<2> slot;
    int kv_parity = 0;
    for (int index; (index = next_tile(shared, slot)) >= 0;) {
      const BackwardTileId tile = backward_tile<Traits>(p, schedule, index);
      key = tile.n_block * kBlockN + warp * 16 + lane / 4;
      if (kMakesDv) kept = KeptColumns(p.mask_of(tile.q, tile.k).transposed(), key);
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) acc[i] = 0.f;
      if (tile.visit.begin < tile.visit.end) {
        ptx::mbarrier_wait(kMakesDv ? &shared.k_full : &shared.v_full, kv_parity);
        kv_parity ^= 1;
        hold_rows<kHeld, kBlockN>(held, kMakesDv ? shared.k : shared.v, warp);
#pragma unroll 1
        for (int g = 0; g < p.gqa_ratio(); ++g) {
          if constexpr (Traits::kGeneral && kMakesDv) begin_head(tile, g);
          run_head(tile, g + 1 == p.gqa_ratio());
        }
      }
      const Sequence rows = Sequence::of(p.k_layout, tile.batch);  // tile.k, not kept for so long
      const float dv_scale = Traits::kGeneral ? scores.dropout_scale() : 1.f;
      store_rows<Element, kColumns>(kMakesDv ? p.dv : p.dk, rows, tile.head_k, acc,
                                    kMakesDv ? dv_scale : static_cast<float>(p.softmax_scale), key,
                                    kMakesDv ? p.head_dim_v : p.head_dim);
    }
  }
};

template <class Traits>
FLASH_DEVICE void init_keys_barriers(typename Traits::SharedStorage& shared) {
  constexpr int kOneWarpgroup = 4;  // warps
  ptx::mbarrier_init(&shared.k_full, 1);
  ptx::mbarrier_init_for_warps(&shared.k_empty, kOneWarpgroup);
  ptx::mbarrier_init(&shared.v_full, 1);
  ptx::mbarrier_init_for_warps(&shared.v_empty, kOneWarpgroup);
  ptx::mbarrier_init_for_warps(&shared.p_full, kOneWarpgroup);
  ptx::mbarrier_init_for_warps(&shared.p_empty, kOneWarpgroup);
  for (int i = 0; i < Traits::kQuerySlots; ++i) {
    ptx::mbarrier_init(&shared.q_full[i], 1);
    ptx::mbarrier_init_for_warps(&shared.q_empty[i], Traits::kMmaWarps);
  }
  for (int i = 0; i < Traits::kStages; ++i) {
    ptx::mbarrier_init(&shared.dout_full[i], 1);
    ptx::mbarrier_init_for_warps(&shared.dout_empty[i], Traits::kMmaWarps);
  }
  for (int i = 0; i < 2; ++i) {
    ptx::mbarrier_init(&shared.tile_full[i], 1);
    ptx::mbarrier_init_for_warps(&shared.tile_empty[i], Traits::kMmaWarps);
  }
  if constexpr (Traits::kGeneral) {
    for (int i = 0; i < Traits::kPairStages; ++i) {
      ptx::mbarrier_init(&shared.pairs.full[i], 1);
      ptx::mbarrier_init_for_warps(&shared.pairs.empty[i], kOneWarpgroup);  // the one that makes P
    }
  }
  ptx::mbarrier_init_fence();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    keys_kernel(const __grid_constant__ BackwardMaps maps, const __grid_constant__ BackwardParams p,
                const __grid_constant__ BackwardSchedule schedule) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(raw);
  if (threadIdx.x == 0) init_keys_barriers<Traits>(shared);
  __syncthreads();  // barriers exist before any role touches them

  const int warpgroup = warp_uniform(threadIdx.x >> 7);
  if (warpgroup == 0) {
    ptx::shrink_registers<Traits::kLoadRegisters>();
    if (threadIdx.x == 0) {
      ptx::wait_for_previous_grid();  // lse, delta and counters, which queries_kernel needs too
      ptx::launch_next_grid();
      load_backward_tiles<Traits>(maps, p, schedule, shared);
    }
  } else if (warpgroup == 1) {
    ptx::grow_registers<Traits::kValuesRegisters>();
    KeysCompute<Traits, KeyGradient::kValues>(maps, p, schedule, shared).run();
  } else {
    ptx::grow_registers<Traits::kKeysRegisters>();
    KeysCompute<Traits, KeyGradient::kKeys>(maps, p, schedule, shared).run();
  }
}

}  // namespace flash::cuda::sm90
