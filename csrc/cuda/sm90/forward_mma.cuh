// SPDX-License-Identifier: BSD-3-Clause
// What a warpgroup does with its 64 rows of every tile of the CTA.
//
// One step, key block n after key block n + 1 (blocks are walked from the last to the first):
//   issue S(n) = Q K(n)^T, issue O += P(n+1) V(n+1)    both queue behind the other warpgroups'
//   products softmax of S(n)                                    runs under the second product P(n)
//   to 16 bits, O rescaled if a maximum moved
// With stages of Q to spare the first step of a tile is the last one of the tile before it: S of
// the new tile and the last P V of the old one are issued together.
#pragma once

#include "cuda/sm90/forward_softmax.cuh"
#include "cuda/sm90/scheduler.cuh"
#include "primitives/ptx/stmatrix.cuh"

namespace flash::cuda::sm90 {

template <class Traits>
struct ForwardMma {
  using Element = typename Traits::Element;
  using Shared = typename Traits::SharedStorage;
  static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr uint64_t kRowsByDepth = ptx::descriptor_layout(16, 1024);  // Q, K: K-major
  static constexpr uint64_t kDepthByRows =
      ptx::descriptor_layout(kBlockN * 128, 1024);  // V: MN-major
  // Without a stage of Q to do a tile again, the exponent must be safe at once.
  static constexpr Exponent kUsualExponent =
      Traits::kStoresThroughQ ? Exponent::kMultiplyAdd : Exponent::kSubtractFirst;

  const ForwardParams& p;
  Shared& shared;
  const int warpgroup, warp, lane;
  const IntervalMask mask;
  const int turn, next_turn, own_barrier;

  float accO[kHeadDim / 2];
  uint32_t rP[kBlockN / 4];  // P(n + 1) as A fragments: the layout of the accumulator
  int accumulate = 0;        // the first product of a tile overwrites accO
  RowSoftmax<Traits> softmax;
  float inverse[2];            // 1 / l of the tile that finish_rows saw
  Ring<Traits::kStages> ring;  // K(n); V(n + 1) is one position behind
  Ring<Traits::kQueryStages> q_ring;
  TileId tile;
  int first_row, n_block;  // of this warpgroup; next block
  BlockRanges blocks;
  int q_stage = 0;
  uint32_t sQ;

  FLASH_DEVICE ForwardMma(const ForwardParams& params, Shared& storage, int warpgroup_)
      : p(params),
        shared(storage),
        warpgroup(warpgroup_),
        warp(warp_uniform((threadIdx.x >> 5) & 3)),
        lane(threadIdx.x & 31),
        mask(params.mask.of(params.q_layout.max, params.k_layout.max)),
        turn(1 + warpgroup_),
        next_turn(1 + (warpgroup_ + 1) % Traits::kMmaWarpgroups),
        own_barrier(1 + Traits::kMmaWarpgroups + warpgroup_) {
    softmax.scale_log2 = static_cast<float>(params.softmax_scale * 1.4426950408889634);
  }

  /// Row r (0 or 1) of this thread.
  FLASH_DEVICE int row(int r) const { return first_row + warp * 16 + lane / 4 + 8 * r; }

  FLASH_DEVICE void release(uint64_t* empty) const {  // one arrival per warp
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(empty);
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
    const uint64_t b = ptx::descriptor(kRowsByDepth, shared_address(shared.k[stage]));
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
    const uint64_t b = ptx::descriptor(kDepthByRows, shared_address(shared.v[stage]));
#pragma unroll
    for (int i = 0; i < kBlockN / 16; ++i) {
      ptx::Wgmma<Element, kHeadDim>::template rs<1>(
          accO, &rP[4 * i], ptx::advance(b, ptx::mn_major_step(i)), i > 0 ? 1 : accumulate);
    }
    ptx::wgmma_commit();
    accumulate = 1;
  }
  /// S = -inf where the mask drops the pair.
  FLASH_DEVICE void apply_mask(float (&accS)[kBlockN / 2]) const {
    const int first_column = n_block * kBlockN + (lane & 3) * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int begin = mask.key_begin(row(r)) - first_column;
      const int end = mask.key_end(row(r)) - first_column;
#pragma unroll
      for (int j = 0; j < kBlockN / 4; ++j) {
        const int column = j / 2 * 8 + j % 2;
        if (column < begin || column >= end) accS[j / 2 * 4 + r * 2 + j % 2] = -INFINITY;
      }
    }
  }
  FLASH_DEVICE void take_weights(const float (&accS)[kBlockN / 2]) {
#pragma unroll
    for (int i = 0; i < kBlockN / 4; ++i) rP[i] = pack<Element>(accS[2 * i], accS[2 * i + 1]);
  }

  enum class Step { kMasked, kFull };

  /// S of n_block and P V of the block after it.
  template <Step kStep>
  FLASH_DEVICE void step() {
    float accS[kBlockN / 2];
    const Ring<Traits::kStages> previous = ring;
    ring.advance();
    ptx::mbarrier_wait(&shared.k_full[ring.stage], ring.parity);
    take_turn();
    ptx::pin(accS), ptx::pin(accO), ptx::pin(rP);
    ptx::wgmma_fence();
    issue_scores(accS, ring.stage);
    ptx::mbarrier_wait(&shared.v_full[previous.stage], previous.parity);
    ptx::wgmma_fence();
    issue_output(previous.stage);
    pass_turn();
    ptx::wgmma_wait<1>();  // S is there, O still runs
    ptx::pin(accS);
    release(&shared.k_empty[ring.stage]);
    if (kStep == Step::kMasked) apply_mask(accS);
    if (kStep == Step::kFull && Traits::kKeepsMaximum) {
      softmax.keep(accS);
    } else if (kStep == Step::kMasked && Traits::kStoresThroughQ && tile.is_redo()) {
      softmax.template update<Exponent::kSubtractFirst>(accS);
    } else {
      softmax.template update<kUsualExponent>(accS);
    }
    ptx::wgmma_wait<0>();  // O is there, rP is free
    ptx::pin(accO), ptx::pin(rP);
    release(&shared.v_empty[previous.stage]);
    take_weights(accS);
    if (!(kStep == Step::kFull && Traits::kKeepsMaximum) && softmax.any_rescale()) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) accO[i] *= softmax.rescale[(i >> 1) & 1];
    }
    --n_block;
  }

  /// First block of `next`; under it, the last P V of the tile in hand if there is one.
  template <bool kTileInHand>
  FLASH_DEVICE void first_step(TileId next) {
    float accS[kBlockN / 2];
    const Ring<Traits::kStages> previous = ring;
    const uint32_t old_q = sQ;
    const int old_stage = q_stage;
    const int next_row = next.m_block * kBlockM + warpgroup * 64;
    const Range visit = key_blocks<kBlockN>(mask, next.m_block * kBlockM, kBlockM).visit;
    const BlockRanges own = key_blocks_within<kBlockN>(mask, next_row, visit);
    sQ = shared_address(shared.q[q_ring.stage]) + warpgroup * 64 * 128;
    if (kTileInHand) ring.advance();
    Ring<Traits::kStages> skipped = ring;
    for (int n = visit.end; n > own.visit.end; --n) {  // no row here sees a key of this block
      ptx::mbarrier_wait(&shared.k_full[ring.stage], ring.parity);
      release(&shared.k_empty[ring.stage]);
      take_turn();
      pass_turn();
      ring.advance();
    }
    ptx::mbarrier_wait(&shared.k_full[ring.stage], ring.parity);
    if (kTileInHand) take_turn();
    ptx::pin(accS);
    if (kTileInHand) ptx::pin(accO), ptx::pin(rP);
    ptx::wgmma_fence();
    issue_scores(accS, ring.stage);
    if (kTileInHand) {
      ptx::mbarrier_wait(&shared.v_full[previous.stage], previous.parity);
      ptx::wgmma_fence();
      issue_output(previous.stage);
      pass_turn();
      finish_rows();
      ptx::wgmma_wait<1>();
    } else {
      ptx::wgmma_wait<0>();
    }
    ptx::pin(accS);
    release(&shared.k_empty[ring.stage]);
    tile = next;
    q_stage = q_ring.stage;
    first_row = next_row;
    blocks = own;
    n_block = own.visit.end - 1;
    apply_mask(accS);
    if (Traits::kStoresThroughQ && tile.is_redo()) {
      softmax.template first<Exponent::kSubtractFirst>(accS);
    } else {
      softmax.template first<kUsualExponent>(accS);
    }
    if (kTileInHand) {
      ptx::wgmma_wait<0>();
      ptx::pin(accO), ptx::pin(rP);
      release(&shared.v_empty[previous.stage]);
    }
    take_weights(accS);
    if (kTileInHand) put_output(old_q, &shared.o_full[old_stage][warpgroup]);
    accumulate = 0;
    for (int n = visit.end; n > own.visit.end; --n) {
      ptx::mbarrier_wait(&shared.v_full[skipped.stage], skipped.parity);
      release(&shared.v_empty[skipped.stage]);
      skipped.advance();
    }
    --n_block;
    ring.stage = to_uniform(ring.stage);
    ring.parity = to_uniform(ring.parity);
    sQ = to_uniform(sQ);
    n_block = to_uniform(n_block);
  }

  /// l and lse of the tile in hand; a warp with an unsafe row marks the tile.
  FLASH_DEVICE void finish_rows() {
    softmax.reduce_sums();
    inverse[0] = softmax.inverse_sum(0), inverse[1] = softmax.inverse_sum(1);
    float* lse =
        static_cast<float*>(p.lse.data) + p.lse.offset({0, tile.batch, p.q_layout.max}, tile.head);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float value = softmax.lse(r, static_cast<float>(p.softmax_scale));
      if ((lane & 3) == 0 && row(r) < p.q_layout.max) lse[row(r)] = value;
    }
    if (Traits::kStoresThroughQ && !tile.is_redo()) {
      const bool unsafe = !softmax.is_safe(0) || !softmax.is_safe(1);
      if (__any_sync(0xffffffffu, unsafe) && lane == 0) shared.failed[q_stage] = tile.index;
    }
  }
  /// O / l into this warpgroup's own rows of Q, from where the store thread takes it.
  FLASH_DEVICE void put_output(uint32_t target, uint64_t* full) {
    ptx::named_barrier_sync(own_barrier, 128);  // its four warps have read these rows
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; i += 8) {  // 16 columns
      uint32_t packed[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        packed[j] =
            pack<Element>(accO[i + 2 * j] * inverse[j & 1], accO[i + 2 * j + 1] * inverse[j & 1]);
      }
      const int unit = (i % 32 / 4 + lane / 16) ^ (lane & 7);  // swizzled 16 bytes of the row
      ptx::stmatrix_x4(target + i / 32 * kBlockM * 128 + (warp * 16 + lane % 16) * 128 + unit * 16,
                       packed);
    }
    ptx::fence_proxy_async();
    release(full);
  }
  /// O / l from registers to global memory: pairs of lanes exchange halves, so that a lane writes 8
  /// bytes and a row 32 contiguous ones.
  FLASH_DEVICE void store_output() const {
    const int odd = lane & 1, column = odd * 8 + (lane & 2) * 2;
    auto* out = static_cast<uint16_t*>(p.out.data) +
                p.out.offset({0, tile.batch, p.q_layout.max}, tile.head) + column;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; i += 8) {  // 16 columns
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float scale = inverse[r];
        const uint32_t low = pack<Element>(accO[i + 2 * r] * scale, accO[i + 2 * r + 1] * scale);
        const uint32_t high =
            pack<Element>(accO[i + 4 + 2 * r] * scale, accO[i + 5 + 2 * r] * scale);
        const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
        const uint2 value = odd ? make_uint2(other, high) : make_uint2(low, other);
        if (row(r) < p.q_layout.max && 2 * i + column < p.head_dim_v)
          *reinterpret_cast<uint2*>(out + row(r) * p.out.row_stride + 2 * i) = value;
      }
    }
  }

  /// The last P V of the tile in hand, when no other tile begins under it.
  FLASH_DEVICE void finish_tile() {
    if (!Traits::kStoresThroughQ) release(&shared.q_empty[q_stage]);  // the next Q loads meanwhile
    ptx::mbarrier_wait(&shared.v_full[ring.stage], ring.parity);
    ptx::pin(accO), ptx::pin(rP);
    ptx::wgmma_fence();
    issue_output(ring.stage);
    finish_rows();
    ptx::wgmma_wait<0>();
    ptx::pin(accO);
    release(&shared.v_empty[ring.stage]);
    ring.advance();
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
      next = {to_uniform(next.m_block), to_uniform(next.head), to_uniform(next.batch),
              to_uniform(next.index)};
      if (next.m_block >= 0) {
        if (tile_in_hand) {
          first_step</*kTileInHand=*/true>(next);
        } else {
          first_step</*kTileInHand=*/false>(next);
        }
        tile_in_hand = true;
        q_ring.advance();
        const bool redo = Traits::kStoresThroughQ && tile.is_redo();
        const int full_end = to_uniform(redo ? blocks.visit.begin : blocks.full.end);
        const int full_begin = to_uniform(redo ? blocks.visit.begin : blocks.full.begin);
        const int visit_begin = to_uniform(blocks.visit.begin);
#pragma unroll 1
        while (n_block >= full_end && n_block >= visit_begin) step<Step::kMasked>();
#pragma unroll 1
        while (n_block >= full_begin) step<Step::kFull>();
#pragma unroll 1
        while (n_block >= visit_begin) step<Step::kMasked>();
        if (Traits::kStoresThroughQ) continue;
      }
      if (tile_in_hand) finish_tile();
      tile_in_hand = false;
      if (next.m_block == TileId::kStop) return;
      if (next.m_block == TileId::kFinish) q_ring.advance();
    }
  }
};

}  // namespace flash::cuda::sm90
