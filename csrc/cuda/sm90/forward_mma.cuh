// SPDX-License-Identifier: BSD-3-Clause
// What a warpgroup does with its 64 rows of every tile of the CTA.
//
// One step, key block n after key block n + 1 (blocks are walked from the last to the first):
//   issue S(n) = Q K(n)^T and O += P(n + 1) V(n + 1): behind the other warpgroups' products
//   softmax of S(n): under the second product
//   P(n) to 16 bits; O rescaled if a maximum moved
//
// With stages of Q to spare the first step of a tile is the last one of the tile before it: S of
// the new tile and the last P V of the old one are issued together.
#pragma once

#include "cuda/sm90/forward_output.cuh"
#include "cuda/sm90/forward_scores.cuh"
#include "cuda/sm90/forward_softmax.cuh"
#include "cuda/sm90/scheduler.cuh"
#include "cuda/sm90/swizzled_rows.cuh"

namespace flash::cuda::sm90 {

template <class Traits>
struct ForwardMma {
  using Element = typename Traits::Element;
  using Shared = typename Traits::SharedStorage;
  using KnownPairs = flash::cuda::sm90::KnownPairs<Traits::kBlockN>;
  static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  static constexpr int kHeadDim = Traits::kHeadDim, kHeadDimV = Traits::kHeadDimV;
  static constexpr uint64_t kRowsByDepth = ptx::descriptor_layout(16, 1024);  // Q, K: K-major
  static constexpr uint64_t kDepthByRows =
      ptx::descriptor_layout(kBlockN * 128, 1024);  // V: MN-major
  // Where a tile cannot be done again, the exponent must be safe at once.
  static constexpr Exponent kUsualExponent =
      Traits::kMayRedo ? Exponent::kMultiplyAdd : Exponent::kSubtractFirst;

  const ForwardParams& p;
  Shared& shared;
  const int warpgroup, warp, lane;
  const int turn, next_turn, own_barrier;

  float accO[kHeadDimV / 2];
  uint32_t rP[kBlockN / 4];  // P(n + 1) as A fragments: the layout of the accumulator
  int accumulate = 0;        // the first product of a tile overwrites accO
  RowSoftmax<Traits> softmax;
  float inverse[2];  // 1 / l of the tile that finish_rows saw
  typename Traits::KeyValueRing ring;
  Ring<Traits::kQueryStages> q_ring;
  TileId tile;
  IntervalMask mask;       // of the tile in hand
  int first_row, n_block;  // of this warpgroup; next block
  BlockRanges blocks;
  int q_stage = 0;
  uint32_t sQ;
  uint64_t* const kv_ready;
  const int shared_heads_log2;          // of a tile
  const PairTiles& pair_tiles;          // general variant
  Ring<Traits::kPairStages> pair_ring;  // tile of n_block

  FLASH_DEVICE ForwardMma(const ForwardMaps& maps, const ForwardParams& params, Shared& storage,
                          int warpgroup_)
      : p(params),
        shared(storage),
        warpgroup(warpgroup_),
        warp(warp_uniform((threadIdx.x >> 5) & 3)),
        lane(threadIdx.x & 31),
        turn(1 + warpgroup_),
        next_turn(1 + (warpgroup_ + 1) % Traits::kMmaWarpgroups),
        own_barrier(1 + Traits::kMmaWarpgroups + warpgroup_),
        kv_ready(Traits::kGeneral && has_unattended_keys(params) ? storage.kv_clean
                                                                 : storage.kv_full),
        shared_heads_log2(maps.q.log2_heads),
        pair_tiles(maps.pairs) {
    softmax.scale_log2 = unit() * 1.4426950408889634f;
  }

  /// Scores come to the softmax as products, or as what the modifications made of them.
  FLASH_DEVICE float unit() const {
    return Traits::kHooks ? 1.f : static_cast<float>(p.softmax_scale);
  }

  /// Row r (0 or 1) of this thread, and whose query it is: of the head tile.head, or of one after
  /// it that shares the tile. Eight rows on are other queries of the same head, or the same query
  /// of another one.
  FLASH_DEVICE int row(int r) const { return first_row + warp * 16 + lane / 4 + 8 * r; }
  FLASH_DEVICE int log2_heads() const { return Traits::kGeneral ? 0 : shared_heads_log2; }
  FLASH_DEVICE int query(int r) const { return row(r) >> log2_heads(); }
  FLASH_DEVICE bool is_row(int r) const { return query(r) < tile.q.length; }
  /// Elements from the first row of tile.head to row 0, and from there to row 1.
  template <class Stride>
  FLASH_DEVICE int64_t first_offset(Stride head_stride, Stride query_stride) const {
    const int head_after = row(0) & ((1 << log2_heads()) - 1);
    return int64_t{head_after} * head_stride + int64_t{query(0)} * query_stride;
  }
  template <class Stride>
  FLASH_DEVICE int64_t offset_between(Stride head_stride, Stride query_stride) const {
    return log2_heads() <= 3 ? int64_t{8 >> log2_heads()} * query_stride : int64_t{8} * head_stride;
  }
  FLASH_DEVICE GeneralScores<Traits> scores(uint32_t pair_tile = 0) const {
    return {p, tile, row(0), pair_tiles.kind, pair_tile};
  }

  FLASH_DEVICE void await(Place at) const { ptx::mbarrier_wait(&kv_ready[at.stage], at.parity); }
  FLASH_DEVICE void give_back(Place at) const { release(&shared.kv_empty[at.stage]); }
  FLASH_DEVICE void skip(Place at) const {
    await(at);
    give_back(at);
  }
  FLASH_DEVICE void take_turn() const {
    if (Traits::kTakeTurns) ptx::named_barrier_sync(turn, 256);
  }
  FLASH_DEVICE void pass_turn() const {
    if (Traits::kTakeTurns) ptx::named_barrier_arrive(next_turn, 256);
  }

  /// S = Q K^T
  FLASH_DEVICE void issue_scores(float (&accS)[kBlockN / 2], int stage) const {
    const uint64_t a = ptx::descriptor(kRowsByDepth, sQ);
    const uint64_t b = ptx::descriptor(kRowsByDepth, shared_address(shared.kv[stage]));
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      ptx::Wgmma<Element, kBlockN>::template ss<0, 0>(
          accS, ptx::advance(a, ptx::k_major_step(i, kBlockM)),
          ptx::advance(b, ptx::k_major_step(i, kBlockN)), i > 0);
    }
    ptx::wgmma_commit();
  }
  /// O += P V
  FLASH_DEVICE void issue_output(int stage) {
    const uint64_t b = ptx::descriptor(kDepthByRows, shared_address(shared.kv[stage]));
#pragma unroll
    for (int i = 0; i < kBlockN / 16; ++i) {
      ptx::Wgmma<Element, kHeadDimV>::template rs<1>(
          accO, &rP[4 * i], ptx::advance(b, ptx::mn_major_step(i)), i > 0 ? 1 : accumulate);
    }
    ptx::wgmma_commit();
    accumulate = 1;
  }
  FLASH_DEVICE int first_column() const { return n_block * kBlockN + (lane & 3) * 2; }

  /// What is known of the pairs of n_block without their products, while these run.
  FLASH_DEVICE KnownPairs find_pairs() {
    KnownPairs known{};
    if constexpr (Traits::kMasksProducts)
      with_pair_tile(pair_tiles, shared.pairs, pair_ring, [&](uint32_t tile) {
        if (pair_tiles.kind == PairKind::kMask) known.kept = scores(tile).kept();
      });
    if constexpr (Traits::kDrawsEarly)
      if (scores().has_dropout()) known.drawn = scores().drawn(first_column());
    return known;
  }
  /// Products become scores; in blocks at the edge of the mask they lose what it drops.
  FLASH_DEVICE void make_scores(float (&accS)[kBlockN / 2], const KnownPairs& known, bool is_edge) {
    if constexpr (Traits::kHooks)
      with_pair_tile(pair_tiles, shared.pairs, pair_ring,
                     [&](uint32_t tile) { scores(tile).modify(accS, first_column()); });
    if constexpr (Traits::kMasksProducts)
      if (pair_tiles.kind == PairKind::kMask) known.kept.apply(accS);
    if (is_edge) apply_interval(accS, mask, {query(0), query(1)}, first_column());
  }
  /// With hooks one loop walks all blocks, and asks.
  FLASH_DEVICE bool may_be_edge() const {
    return !Traits::kHooks || n_block < blocks.full.begin || n_block >= blocks.full.end;
  }
  FLASH_DEVICE void take_weights(float (&accS)[kBlockN / 2], const KnownPairs& known) {
#pragma unroll
    for (int i = 0; i < kBlockN / 4; ++i) rP[i] = pack<Element>(accS[2 * i], accS[2 * i + 1]);
    if constexpr (Traits::kGeneral)
      if (scores().has_dropout())
        (Traits::kDrawsEarly ? known.drawn : scores().drawn(first_column())).apply(rP);
  }

  /// A mask of pairs may have left a row without a maximum to keep.
  FLASH_DEVICE bool may_keep() const {
    return Traits::kKeepsMaximum && !(Traits::kMasksProducts && softmax.any_empty());
  }
  FLASH_DEVICE UnsafeRows& marks() const { return shared.marks[q_stage][4 * warpgroup + warp]; }

  enum class Step { kMasked, kFull };

  /// S of n_block and P V of the block after it.
  template <Step kStep>
  FLASH_DEVICE void step() {
    float accS[kBlockN / 2];
    Place keys, values;
    ring.step(keys, values);
    await(keys);
    take_turn();
    ptx::pin(accS), ptx::pin(accO), ptx::pin(rP);
    ptx::wgmma_fence();
    issue_scores(accS, keys.stage);
    await(values);
    ptx::wgmma_fence();
    issue_output(values.stage);
    pass_turn();
    const KnownPairs known = find_pairs();
    ptx::wgmma_wait<1>();  // S is there, O still runs
    ptx::pin(accS);
    give_back(keys);
    make_scores(accS, known, kStep == Step::kMasked && may_be_edge());
    const bool keeps = kStep == Step::kFull && may_keep();
    if (keeps) {
      softmax.keep(accS);
    } else if (kStep == Step::kMasked && Traits::kMayRedo && tile.is_redo()) {
      const bool kept = n_block >= blocks.full.begin && n_block < blocks.full.end && may_keep();
      softmax.update_again(accS, marks(), kept);
    } else {
      softmax.template update<kUsualExponent>(accS);
    }
    ptx::pin(accS);        // the softmax stays above the wait, under the second product
    ptx::wgmma_wait<0>();  // O is there, rP is free
    ptx::pin(accO), ptx::pin(rP);
    give_back(values);
    take_weights(accS, known);
    if (!keeps && softmax.any_rescale()) {
#pragma unroll
      for (int i = 0; i < kHeadDimV / 2; ++i) accO[i] *= softmax.rescale[(i >> 1) & 1];
    }
    --n_block;
  }

  /// First block of `next`; under it, the last P V of the tile in hand if there is one.
  template <bool kTileInHand>
  FLASH_DEVICE void first_step(TileId next) {
    float accS[kBlockN / 2];
    const Place values = kTileInHand ? ring.last_values() : Place();  // of the tile in hand
    const uint32_t old_q = sQ;
    const int old_stage = q_stage;
    const IntervalMask next_mask = mask_of(p, next);
    const int next_row = next.m_block * kBlockM + warpgroup * 64;
    const Range visit = next.visit;
    const BlockRanges own = key_blocks_within<kBlockN, Traits::KeyValueRing::kMostSkipped>(
        next_mask, queries_of(log2_heads(), next_row, 64), visit);
    sQ = shared_address(shared.q[q_ring.stage]) + warpgroup * 64 * 128;
    Place keys = ring.keys(), unseen_values{};
    for (int n = visit.end; n > own.visit.end; --n) {  // no row here sees a key of this block
      skip(keys);
      if (n < visit.end) skip(unseen_values);
      if constexpr (Traits::kGeneral)
        with_pair_tile(pair_tiles, shared.pairs, pair_ring, [](uint32_t) {});
      take_turn();
      pass_turn();
      ring.step(keys, unseen_values);
    }
    await(keys);
    if (kTileInHand) take_turn();
    ptx::pin(accS);
    if (kTileInHand) ptx::pin(accO), ptx::pin(rP);
    ptx::wgmma_fence();
    issue_scores(accS, keys.stage);
    if (kTileInHand) {
      await(values);
      ptx::wgmma_fence();
      issue_output(values.stage);
      pass_turn();
      finish_rows();
      ptx::wgmma_wait<1>();
    } else {
      ptx::wgmma_wait<0>();
    }
    ptx::pin(accS);
    give_back(keys);
    if (visit.end > own.visit.end) skip(unseen_values);
    tile = next;
    mask = next_mask;
    q_stage = q_ring.stage;
    first_row = next_row;
    blocks = own;
    n_block = own.visit.end - 1;
    const KnownPairs known = find_pairs();
    make_scores(accS, known, may_be_edge());
    if (Traits::kMayRedo && tile.is_redo()) {
      softmax.first_again(accS, marks());
    } else {
      softmax.template first<kUsualExponent>(accS);
    }
    if (kTileInHand) {
      ptx::wgmma_wait<0>();
      ptx::pin(accO), ptx::pin(rP);
      give_back(values);
    }
    take_weights(accS, known);
    if (kTileInHand) put_output(old_q, &shared.o_full[old_stage][warpgroup]);
    accumulate = 0;
    --n_block;
    ring.at.stage = to_uniform(ring.at.stage);
    ring.at.parity = to_uniform(ring.at.parity);
    sQ = to_uniform(sQ);
    n_block = to_uniform(n_block);
  }

  /// l and lse of the tile in hand; a warp with an unsafe row marks the tile.
  FLASH_DEVICE void finish_rows() {
    softmax.reduce_sums();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float factor = 1.f;
      if (Traits::kHooks && scores().has_sink()) factor = softmax.add_sink(r, scores().sink());
      if (Traits::kGeneral) factor *= scores().dropout_scale();
      inverse[r] = factor * softmax.inverse_sum(r);
    }
    const int lse_stride = static_cast<int>(p.lse.head_stride);  // the rows of a tensor
    float* lse = static_cast<float*>(p.lse.data) + p.lse.offset(tile.q, tile.head) +
                 first_offset(lse_stride, 1);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float value = softmax.lse(r, unit());
      if ((lane & 3) == 0 && is_row(r)) lse[r * offset_between(lse_stride, 1)] = value;
    }
    if (Traits::kMayRedo) {
      const bool redo = tile.is_redo();
      const UnsafeRows unsafe = redo ? UnsafeRows{} : softmax.unsafe_rows();
      if (redo || unsafe.any()) {
        __syncwarp();  // all lanes have read what was left there
        if (lane == 0) marks() = unsafe;
        if (lane == 0 && !redo) shared.failed[q_stage] = tile.index;
      }
    }
  }
  /// O / l to where the store thread takes it.
  FLASH_DEVICE void put_output(uint32_t target, uint64_t* full) {
    clear_empty_rows(accO, inverse);
    ptx::named_barrier_sync(own_barrier, 128);  // its four warps have read these rows
    put_rows<Element, kBlockM>(accO, inverse, target);
    ptx::fence_proxy_async();
    release(full);
  }
  FLASH_DEVICE void store_output() {
    clear_empty_rows(accO, inverse);
    auto* out = static_cast<uint16_t*>(p.out.data) + p.out.offset(tile.q, tile.head) +
                first_offset(p.out.head_stride, p.out.row_stride);
    output_to_global<Element>(accO, inverse, out,
                              offset_between(p.out.head_stride, p.out.row_stride),
                              {is_row(0), is_row(1)}, p.head_dim_v);
  }

  /// The last P V of the tile in hand, when no other tile begins under it.
  FLASH_DEVICE void finish_tile() {
    if (!Traits::kStoresThroughQ) release(&shared.q_empty[q_stage]);  // the next Q loads meanwhile
    const Place values = ring.last_values();
    await(values);
    ptx::pin(accO), ptx::pin(rP);
    ptx::wgmma_fence();
    issue_output(values.stage);
    finish_rows();
    ptx::wgmma_wait<0>();
    ptx::pin(accO);
    give_back(values);
    if (Traits::kStoresThroughQ) {
      put_output(sQ, &shared.o_full[q_stage][warpgroup]);
    } else {
      store_output();
    }
  }

  FLASH_DEVICE void run() {
    if (Traits::kTakeTurns && next_turn == 1)
      ptx::named_barrier_arrive(next_turn, 256);  // the first turn
    bool tile_in_hand = false;
    while (true) {
      ptx::mbarrier_wait(&shared.q_full[q_ring.stage], q_ring.parity);
      TileId next = shared.tile[q_ring.stage];
      next.m_block = to_uniform(next.m_block);
      next.head = to_uniform(next.head);
      next.index = to_uniform(next.index);
      next.q.length = to_uniform(next.q.length);
      next.k.length = to_uniform(next.k.length);
      next.diagonal = to_uniform(next.diagonal);
      if (next.m_block >= 0) {
        if (tile_in_hand) {
          first_step</*kTileInHand=*/true>(next);
        } else {
          first_step</*kTileInHand=*/false>(next);
        }
        tile_in_hand = true;
        q_ring.advance();
        const bool redo = Traits::kMayRedo && tile.is_redo();
        const int full_end = to_uniform(redo ? blocks.visit.begin : blocks.full.end);
        const int full_begin = to_uniform(redo ? blocks.visit.begin : blocks.full.begin);
        const int visit_begin = to_uniform(blocks.visit.begin);
        if constexpr (!Traits::kHooks) {  // its steps ask for each block
#pragma unroll 1
          while (n_block >= full_end && n_block >= visit_begin) step<Step::kMasked>();
#pragma unroll 1
          while (n_block >= full_begin) step<Step::kFull>();
        }
#pragma unroll 1
        while (n_block >= visit_begin) step<Step::kMasked>();
        if (Traits::kStoresThroughQ) continue;
      }
      if (tile_in_hand) finish_tile();
      tile_in_hand = false;
      if (next.m_block == TileId::kStop) return;
      if (next.m_block == TileId::kFinish) {
        release(&shared.o_full[q_ring.stage][warpgroup]);
        q_ring.advance();
      }
    }
  }
};

}  // namespace flash::cuda::sm90
