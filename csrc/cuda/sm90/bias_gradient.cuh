// SPDX-License-Identifier: BSD-3-Clause
// dbias where the bias has all rows and columns, but several blocks of dS add up in one of its
// tiles: it broadcasts over batch or heads.
//
// Grid      persistent; a tile is 128 queries x 128 keys of the bias's own shape, which walks the
//           batches and heads that it sums up, in a fixed order: no atomics, one rounding, nothing
//           of N x N in memory.
// Roles     thread 0 loads; warpgroups 1 and 2: 64 queries each. For each block
//             S = Q K^T, P = exp(S - lse);  dP = dO V^T, dS = P o (dP - delta), added in registers
// Shared    a ring of slots: Q with K, dO with V, Q with K ..., each with its PairBlock; the tile
//           of the bias, once.
#pragma once

#include "cuda/common/bias_tile.cuh"
#include "cuda/sm90/backward_load.cuh"
#include "cuda/sm90/backward_mma.cuh"
#include "cuda/sm90/backward_scores.cuh"

namespace flash::cuda::sm90 {

/// What a slot holds: the block of pairs that its rows belong to, or no rows.
struct PairBlock {
  static constexpr int kEndOfTile = -1, kStop = -2;  ///< in place of m_block

  int m_block, n_block, batch, head;
  bool is_masked, is_first;  ///< of the tile
  Sequence q, k;
};

template <class Element_, int kHeadDim_>
struct BiasTraits {
  using Element = Element_;
  static constexpr bool kGeneral = true;
  static constexpr int kHeadDim = kHeadDim_, kChunks = kHeadDim / 64;
  static constexpr int kBlockM = 128, kBlockN = 128;
  static constexpr int kSlots = kHeadDim == 64 ? 4 : 3;
  static constexpr int kThreads = 384, kLoadRegisters = 40, kMmaRegisters = 232, kMmaWarps = 8;
  using Tile = BiasTile<kBlockM, kBlockN>;

  struct SharedStorage {
    uint16_t slot[kSlots][(kBlockM + kBlockN) * kChunks * 64];  // rows of queries, rows of keys
    uint8_t bias[kBlockM * kBlockN * 2];
    PairBlock block[kSlots];
    uint64_t full[kSlots], empty[kSlots], bias_full, bias_empty;
  };
  static_assert(sizeof(SharedStorage) <= 232448, "exceeds the shared memory of one SM");
};

/// f(block) for all blocks of pairs that a tile sums up and the mask visits.
template <class Traits, class F>
FLASH_DEVICE void for_each_block(const BackwardParams& p, const typename Traits::Tile& tile,
                                 F&& f) {
#pragma unroll 1
  for (int batch = tile.batches.begin; batch < tile.batches.end; ++batch) {
    const Sequence q = Sequence::of(p.q_layout, batch), k = Sequence::of(p.k_layout, batch);
    const IntervalMask mask = p.mask_of(q, k);
#pragma unroll 1
    for (int m = tile.m_blocks.begin; m < tile.m_blocks.end; ++m) {
      if (m * Traits::kBlockM >= q.length) break;
      const bool is_whole = (m + 1) * Traits::kBlockM <= q.length;
      const BlockRanges range = mask.key_blocks<Traits::kBlockM, Traits::kBlockN>(m);
      const int end = min(range.visit.end, tile.n_blocks.end);
#pragma unroll 1
      for (int n = max(range.visit.begin, tile.n_blocks.begin); n < end; ++n) {
        const bool is_masked = !is_whole || n < range.full.begin || n >= range.full.end;
#pragma unroll 1
        for (int head = tile.heads.begin; head < tile.heads.end; ++head)
          f(PairBlock{m, n, batch, head, is_masked, false, q, k});
      }
    }
  }
}

/// Whether a tile of the bias waits in shared memory: its rows and columns are those of the blocks.
FLASH_DEVICE bool is_bias_staged(const BackwardParams& p, const PairTiles& pairs) {
  return pairs.kind == PairKind::kBias && p.bias_shape[2] == p.q_layout.max &&
         p.bias_shape[3] == p.k_layout.max;
}

template <class Traits>
struct BlockLoads {  // of one thread
  static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  static constexpr int kChunks = Traits::kChunks;

  const BackwardMaps& maps;
  const BackwardParams& p;
  typename Traits::SharedStorage& shared;
  Ring<Traits::kSlots> ring;
  int bias_parity = 1;

  /// The rows of a block, or a slot without any.
  FLASH_DEVICE void put(const PairBlock& block, const TmaTensor* queries, const TmaTensor* keys) {
    uint64_t* const full = &shared.full[ring.stage];
    ptx::mbarrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
    shared.block[ring.stage] = block;
    if (queries) {
      uint16_t* const rows = shared.slot[ring.stage];
      ptx::mbarrier_expect_bytes(full, (kBlockM + kBlockN) * kChunks * 128);
      load_rows<kChunks>(*queries, rows, full, kBlockM, block.q, block.m_block * kBlockM,
                         block.head, ptx::kEvictLast);
      load_rows<kChunks>(*keys, rows + kBlockM * kChunks * 64, full, kBlockN, block.k,
                         block.n_block * kBlockN, block.head / p.gqa_ratio(), ptx::kEvictLast);
    } else {
      ptx::mbarrier_arrive(full);
    }
    ring.advance();
  }
  FLASH_DEVICE void load_bias(const PairBlock& block) {
    ptx::mbarrier_wait(&shared.bias_empty, bias_parity);
    load_pair_tile<Traits>(maps.pairs, shared.bias, &shared.bias_full, block.m_block, block.n_block,
                           block.head, block.batch);
    bias_parity ^= 1;
  }
  FLASH_DEVICE void run(int num_tiles) {
    const bool is_staged = is_bias_staged(p, maps.pairs);
    for (int index = blockIdx.x; index < num_tiles; index += gridDim.x) {
      const auto tile = Traits::Tile::of(p, index);
      bool is_first = true;
      for_each_block<Traits>(p, tile, [&](PairBlock block) {
        block.is_first = is_first;
        if (is_first && is_staged) load_bias(block);
        is_first = false;
        put(block, &maps.q, &maps.k);
        put(block, &maps.dout, &maps.v);
      });
      put({PairBlock::kEndOfTile, 0, 0, 0, false, is_first}, nullptr, nullptr);
    }
    put({PairBlock::kStop}, nullptr, nullptr);
  }
};

template <class Traits>
struct BiasCompute {
  using Element = typename Traits::Element;
  using Scores = BackwardScores<Traits, BlockRows::kQueries>;
  static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  static constexpr int kCount = kBlockN / 2;  // accumulators

  const BackwardMaps& maps;
  const BackwardParams& p;
  const RowView& delta_view;
  typename Traits::SharedStorage& shared;
  const int warpgroup, lane, warp;

  float sums[kCount] = {};
  Ring<Traits::kSlots> ring;
  int bias_parity = 0;

  /// The first of this thread's two rows, from that of the tile.
  FLASH_DEVICE int own_row() const { return warpgroup * 64 + warp * 16 + lane / 4; }

  FLASH_DEVICE void next_slot() {
    release(&shared.empty[ring.stage]);
    ring.advance();
  }
  /// acc = queries x keys of the slot.
  template <class F>
  FLASH_DEVICE void multiply(float (&acc)[kCount], F&& meanwhile) {
    const uint16_t* const rows = shared.slot[ring.stage];
    issue_rows_by_rows<Element, Traits::kHeadDim, kBlockM, kBlockN>(
        acc, shared_address(rows) + warpgroup * 64 * 128, rows + kBlockM * Traits::kChunks * 64);
    meanwhile();
    ptx::wgmma_wait<0>();
    ptx::pin(acc);
    next_slot();
  }

  FLASH_DEVICE void add(PairBlock block, PairKind staged) {
    const int row = block.m_block * kBlockM + own_row();
    const int column = block.n_block * kBlockN + (lane & 3) * 2;
    const Scores scores{p, block.batch, block.head, block.q.length, block.k.length};
    float accS[kCount], lse[2], delta[2];
    uint32_t rP[kCount / 2];
    multiply(accS, [&] {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        lse[r] = lse_of<float>(p.lse, block.q, block.head, row + 8 * r);
        delta[r] = delta_of<float>(delta_view, block.q, block.head, row + 8 * r);
      }
    });
    scores.modify(accS, row, column, {staged, shared_address(shared.bias), own_row(), 0},
                  [](int, const uint32_t (&)[8]) {});  // dbias is before the slopes
    if (block.is_masked)
      mask_scores<kBlockN>(KeptColumns(p.mask_of(block.q, block.k), row), accS, block.n_block);
    scores.weights(rP, accS, RowValues{lse});
    if (scores.has_dropout()) scores.mark_dropped(rP, row, column);
    ptx::pin(rP);
    float accdP[kCount];
    ptx::mbarrier_wait(&shared.full[ring.stage], ring.parity);
    multiply(accdP, [] {});
    scores.gradient(rP, accdP, RowValues{delta});
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] += accdP[i];
  }

  template <class T>
  FLASH_DEVICE void store(const typename Traits::Tile& tile) const {
    const int rows = p.bias_shape[2], columns = p.bias_shape[3];
    const int64_t matrix = int64_t{tile.batch} * p.bias_shape[1] + tile.head;
    const int row = tile.row * kBlockM + own_row(), column = tile.col * kBlockN;
    T* const to = static_cast<T*>(p.dbias) + matrix * rows * columns + column;
    if constexpr (sizeof(T) == 2) {
      if (columns % 8 == 0 && reinterpret_cast<uintptr_t>(p.dbias) % 16 == 0)
        return store_rows<T, kBlockN>({to, 0, 0, columns}, {.length = rows}, 0, sums, 1.f, row,
                                      columns - column);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int q = row + i / 2 % 2 * 8, k = i / 4 * 8 + (lane & 3) * 2 + i % 2;
      if (q < rows && column + k < columns) to[q * int64_t{columns} + k] = narrow<T>(sums[i]);
    }
  }

  FLASH_DEVICE void finish_tile(const typename Traits::Tile& tile) {
    if (p.features.score_mod.bias_is_float32) {
      store<float>(tile);
    } else {
      store<Element>(tile);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = 0.f;
  }

  FLASH_DEVICE void run() {
    const bool is_staged = is_bias_staged(p, maps.pairs);
    int index = blockIdx.x;
    while (true) {
      ptx::mbarrier_wait(&shared.full[ring.stage], ring.parity);
      const PairBlock& block = shared.block[ring.stage];
      const int m_block = to_uniform(block.m_block);
      const bool is_first = to_uniform(block.is_first);
      if (m_block == PairBlock::kStop) return;
      if (m_block >= 0) {
        if (is_staged && is_first) ptx::mbarrier_wait(&shared.bias_full, bias_parity);
        add(block, is_staged ? PairKind::kBias : PairKind::kNone);
        continue;
      }
      next_slot();
      if (is_staged && !is_first) {  // there was a block
        release(&shared.bias_empty);
        bias_parity ^= 1;
      }
      finish_tile(Traits::Tile::of(p, index));
      index += gridDim.x;
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    bias_gradient_kernel(const __grid_constant__ BackwardMaps maps,
                         const __grid_constant__ BackwardParams p,
                         const __grid_constant__ RowView delta, int num_tiles) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(raw);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kSlots; ++i) {
      ptx::mbarrier_init(&shared.full[i], 1);
      ptx::mbarrier_init(&shared.empty[i], Traits::kMmaWarps);
    }
    ptx::mbarrier_init(&shared.bias_full, 1);
    ptx::mbarrier_init(&shared.bias_empty, Traits::kMmaWarps);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();  // barriers exist before any role touches them

  const int warpgroup = warp_uniform(threadIdx.x >> 7);
  if (warpgroup == 0) {
    ptx::shrink_registers<Traits::kLoadRegisters>();
    if (threadIdx.x == 0) BlockLoads<Traits>{maps, p, shared}.run(num_tiles);
  } else {
    ptx::grow_registers<Traits::kMmaRegisters>();
    BiasCompute<Traits>{maps,
                        p,
                        delta,
                        shared,
                        warpgroup - 1,
                        static_cast<int>(threadIdx.x & 31),
                        warp_uniform((threadIdx.x >> 5) & 3)}
        .run();
  }
}

}  // namespace flash::cuda::sm90
