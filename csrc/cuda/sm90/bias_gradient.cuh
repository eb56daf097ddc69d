// SPDX-License-Identifier: BSD-3-Clause
// dbias where the bias has all rows and columns, but several blocks of dS add up in one of its
// tiles: it broadcasts over batch or heads.
//
// Grid      persistent; a tile is 128 queries x 128 keys of the bias's own shape, which walks the
//           batches and heads that it sums up, in a fixed order: no atomics, one rounding, nothing
//           of N x N in memory. Where tiles are at most half as many as SMs, a cluster shares the
//           walk of one tile, and the first of them adds up their sums.
// Roles     threads 0 and 32 load; warpgroups 1 and 2: 64 queries each. For each block
//             S = Q K^T and dP = dO V^T are issued;  P = exp(S - lse) under dP;
//             sums += P o (dP - delta)
// Shared    a ring of slots of 64 columns: Q with K and lse, dO with V and delta; tiles of the
//           bias, loaded one tile ahead.
#pragma once

#include "cuda/common/bias_tile.cuh"
#include "cuda/sm90/backward_load.cuh"
#include "cuda/sm90/backward_mma.cuh"
#include "cuda/sm90/backward_scores.cuh"
#include "primitives/ptx/cluster.cuh"

namespace flash::cuda::sm90 {

/// What the kernels before left: (batch, num_heads, rows), rows beyond a sequence +inf and 0.
struct BiasRows {
  const float *lse, *delta;
  int rows;
};

/// Whether tiles of the bias wait in shared memory: one serves all blocks that its tile walks.
FLASH_DEVICE bool stages_bias(const PairTiles& pairs) { return pairs.kind == PairKind::kBias; }

/// A block of pairs, beside the first of its slots. Tiles that are left out have none; an index
/// behind the last one ends the work.
struct PairBlock {
  int tile, m_block, n_block, batch, head;  ///< tile: its index
  bool is_masked;
  int seqlen_q, seqlen_k;
};

template <class Element_, int kHeadDim>
struct BiasTraits {
  using Element = Element_;
  static constexpr bool kGeneral = true;
  static constexpr int kChunks = kHeadDim / 64;  // of Q and K; of dO and V
  static constexpr int kBlockM = 128, kBlockN = 128;
  static constexpr int kSlots = 5, kBiasStages = 2;
  static constexpr int kThreads = 384, kLoadRegisters = 40, kMmaRegisters = 232, kMmaWarps = 8;
  using Tile = BiasTile<kBlockM, kBlockN>;
  // All of dP is in work at once; and from one of its slots to its next, beyond those of the other
  // thread, a load thread moves kChunks + 1: after more than kSlots it would wait for a phase two
  // ahead, which a barrier cannot tell from the one before.
  static_assert(kSlots > kChunks);

  struct SharedStorage {
    uint16_t slot[kSlots][(kBlockM + kBlockN) * 64];  // rows of queries, rows of keys
    uint8_t bias[kBiasStages][kBlockM * kBlockN * 2];
    float row_values[kSlots][kBlockM];
    PairBlock block[kSlots];
    uint64_t full[kSlots], empty[kSlots], bias_full[kBiasStages], bias_empty[kBiasStages];
  };
  static_assert(sizeof(SharedStorage) <= 232448, "exceeds the shared memory of one SM");
};

/// f(block, sequences, key head) for all blocks of pairs that a tile sums up and the mask visits.
template <class Traits, class F>
FLASH_DEVICE void for_each_block(const BackwardParams& p, int index,
                                 const typename Traits::Tile& tile, F&& f) {
  const int m = tile.row, n = tile.col, ratio = p.gqa_ratio();
#pragma unroll 1
  for (int batch = tile.batches.begin; batch < tile.batches.end; ++batch) {
    const Sequence q = Sequence::of(p.q_layout, batch), k = Sequence::of(p.k_layout, batch);
    if (m * Traits::kBlockM >= q.length) continue;
    const BlockRanges range =
        p.mask_of(q, k).template key_blocks<Traits::kBlockM, Traits::kBlockN>(m);
    if (n < range.visit.begin || n >= range.visit.end) continue;
    const bool is_whole = (m + 1) * Traits::kBlockM <= q.length;
    const bool is_masked = !is_whole || n < range.full.begin || n >= range.full.end;
#pragma unroll 1
    for (int head = tile.heads.begin; head < tile.heads.end; ++head)
      f(PairBlock{index, m, n, batch, head, is_masked, q.length, k.length}, q, k, head / ratio);
  }
}

/// Leaves of what a tile walks the share of one CTA of a cluster.
template <class Tile>
FLASH_DEVICE void take_share(Tile& tile, int rank, int size) {
  const auto share = [&](const Range& all) -> Range {
    const int count = all.end - all.begin;
    return {all.begin + count * rank / size, all.begin + count * (rank + 1) / size};
  };
  if (tile.heads.end - tile.heads.begin >= tile.batches.end - tile.batches.begin) {
    tile.heads = share(tile.heads);
  } else {
    tile.batches = share(tile.batches);
  }
}

/// Of two threads: one loads Q with K, the other dO with V, 250 instructions a block each.
template <class Traits>
struct BlockLoads {
  static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;

  const BackwardMaps& maps;
  const BackwardParams& p;
  const BiasRows& rows;
  typename Traits::SharedStorage& shared;
  const bool is_first;  // of the two in a block's slots
  Ring<Traits::kSlots> ring;
  Ring<Traits::kBiasStages> bias_ring;

  FLASH_DEVICE void skip_other() {
#pragma unroll
    for (int i = 0; i < Traits::kChunks; ++i) ring.advance();
  }
  FLASH_DEVICE void wait_for_slot() {
    ptx::mbarrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
  }
  /// Q with K and lse, or dO with V and delta.
  FLASH_DEVICE void put(const PairBlock& block, const Sequence& q, const Sequence& k, int head_k) {
    const TmaTensor& queries = is_first ? maps.q : maps.dout;
    const TmaTensor& keys = is_first ? maps.k : maps.v;
    const int row = block.m_block * kBlockM;
    const float* const values = (is_first ? rows.lse : rows.delta) + row +
                                (int64_t{block.batch} * p.num_heads + block.head) * rows.rows;
    if (!is_first) skip_other();
#pragma unroll
    for (int c = 0; c < Traits::kChunks; ++c) {
      uint64_t* const full = &shared.full[ring.stage];
      uint16_t* const slot = shared.slot[ring.stage];
      wait_for_slot();
      if (is_first && c == 0) shared.block[ring.stage] = block;
      ptx::mbarrier_expect_bytes(full, (kBlockM + kBlockN) * 128 + (c == 0 ? kBlockM * 4 : 0));
      load_rows<1>(queries, slot, full, kBlockM, q, row, block.head, ptx::kEvictLast, c * 64);
      load_rows<1>(keys, slot + kBlockM * 64, full, kBlockN, k, block.n_block * kBlockN, head_k,
                   ptx::kEvictLast, c * 64);
      if (c == 0)
        ptx::bulk_load(shared_address(shared.row_values[ring.stage]), values, kBlockM * 4, full);
      ring.advance();
    }
    if (is_first) skip_other();
  }
  FLASH_DEVICE void load_bias(const PairBlock& block) {
    if (!is_first || !stages_bias(maps.pairs)) return;
    ptx::mbarrier_wait(&shared.bias_empty[bias_ring.stage], bias_ring.parity ^ 1);
    load_pair_tile<Traits>(maps.pairs, shared.bias[bias_ring.stage],
                           &shared.bias_full[bias_ring.stage], block.m_block, block.n_block,
                           block.head, block.batch);
    bias_ring.advance();
  }
  FLASH_DEVICE void run(int num_tiles) {
    const int size = ptx::cluster_size(), ctas = gridDim.x / size;
    int index = blockIdx.x / size;
    for (; index < num_tiles; index += ctas) {
      auto tile = Traits::Tile::of(p, index);
      if (size > 1) take_share(tile, ptx::cluster_rank(), size);
      bool is_new = true;
      for_each_block<Traits>(
          p, index, tile,
          [&](const PairBlock& block, const Sequence& q, const Sequence& k, int head_k) {
            put(block, q, k, head_k);
            if (is_new) load_bias(block);
            is_new = false;
          });
    }
    if (!is_first) return;
    wait_for_slot();
    shared.block[ring.stage].tile = index;
    ptx::mbarrier_arrive(&shared.full[ring.stage]);
  }
};

template <class Traits>
struct BiasCompute {
  using Element = typename Traits::Element;
  using Shared = typename Traits::SharedStorage;
  using Scores = BackwardScores<Traits, BlockRows::kQueries>;
  static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  static constexpr int kChunks = Traits::kChunks;
  static constexpr int kCount = kBlockN / 2;  // accumulators

  const BackwardMaps& maps;
  const BackwardParams& p;
  Shared& shared;
  const int warpgroup, lane, warp;

  float sums[kCount] = {};
  Ring<Traits::kSlots> ring, issued;  // slots before `ring` are given back
  Ring<Traits::kBiasStages> bias_ring;
  // The tile in hand:
  int m_block = 0, n_block = 0, matrix = 0;  // matrix: of the bias's own batch and heads
  bool has_blocks = false;
  bool has_bias = false;  // in bias_ring

  /// The first of this thread's two rows, from that of the tile.
  FLASH_DEVICE int own_row() const { return warpgroup * 64 + warp * 16 + lane / 4; }

  FLASH_DEVICE void give_back() {
    release(&shared.empty[ring.stage]);
    ring.advance();
  }
  FLASH_DEVICE void meet_values(float (&values)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) values[r] = shared.row_values[issued.stage][own_row() + 8 * r];
  }
  /// acc (+)= queries x keys over the 64 columns of a slot; one group of products.
  FLASH_DEVICE void issue(float (&acc)[kCount], bool is_first) {
    constexpr uint64_t kLayout = ptx::descriptor_layout(16, 1024);
    const uint32_t rows = shared_address(shared.slot[issued.stage]);
    const uint64_t a = ptx::descriptor(kLayout, rows + warpgroup * 64 * 128);
    const uint64_t b = ptx::descriptor(kLayout, rows + kBlockM * 128);
    if (is_first) ptx::pin(acc);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i)
      ptx::Wgmma<Element, kBlockN>::template ss<0, 0>(acc, ptx::advance(a, i * 32),
                                                      ptx::advance(b, i * 32), !is_first || i > 0);
    ptx::wgmma_commit();
    issued.advance();
  }
  FLASH_DEVICE void wait_for_slot() const {
    ptx::mbarrier_wait(&shared.full[issued.stage], issued.parity);
  }

  /// sums += dS of a block whose first slot has arrived.
  FLASH_DEVICE void add(const PairBlock& block, uint32_t bias) {
    // What the slot says is read before it is given back.
    const Sequence q{0, 0, to_uniform(block.seqlen_q)}, k{0, 0, to_uniform(block.seqlen_k)};
    const Scores scores{p, to_uniform(block.batch), to_uniform(block.head), q.length, k.length};
    const bool is_masked = to_uniform(block.is_masked);
    const int row = m_block * kBlockM + own_row();
    const int column = n_block * kBlockN + (lane & 3) * 2;
    float accS[kCount], accdP[kCount], lse[2], delta[2];
    meet_values(lse);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c > 0) wait_for_slot();
      issue(accS, c == 0);
      if (c == 0) continue;
      ptx::wgmma_wait<1>();
      give_back();
    }
    wait_for_slot();
    meet_values(delta);
    issue(accdP, true);
    ptx::wgmma_wait<1>();
    ptx::pin(accS);
    give_back();
#pragma unroll
    for (int c = 1; c < kChunks; ++c) {
      wait_for_slot();
      issue(accdP, false);
    }
    scores.modify(accS, row, column,
                  {has_bias ? PairKind::kBias : PairKind::kNone, bias, own_row(), 0},
                  [](int, const uint32_t (&)[8]) {});  // dbias is before the slopes
    if (is_masked) mask_scores<kBlockN>(KeptColumns(p.mask_of(q, k), row), accS, n_block);
    scores.weights(accS, RowValues{lse});
    if (scores.has_dropout()) scores.mark_dropped(accS, row, column);
    ptx::wgmma_wait<0>();
    ptx::pin(accdP);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) give_back();
    if (has_unattended_keys(p)) {
      scores.template add_gradient</*kIsClean=*/false>(sums, accS, accdP, RowValues{delta});
    } else {
      scores.template add_gradient</*kIsClean=*/true>(sums, accS, accdP, RowValues{delta});
    }
  }

  template <class T>
  FLASH_DEVICE void store() const {
    const int rows = p.bias_shape[2], columns = p.bias_shape[3];
    const int row = m_block * kBlockM + own_row(), column = n_block * kBlockN;
    T* const to = static_cast<T*>(p.dbias) + int64_t{matrix} * rows * columns + column;
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
  FLASH_DEVICE void set_place(int row, int column, int batch, int head) {
    m_block = to_uniform(row), n_block = to_uniform(column);
    if (p.bias_shape[0] == 1) batch = 0;
    if (p.bias_shape[1] == 1) head = 0;
    matrix = to_uniform(batch * p.bias_shape[1] + head);
  }
  FLASH_DEVICE void begin_tile(const PairBlock& block) {
    set_place(block.m_block, block.n_block, block.batch, block.head);
    has_blocks = true;
    has_bias = stages_bias(maps.pairs);
    if (has_bias) ptx::mbarrier_wait(&shared.bias_full[bias_ring.stage], bias_ring.parity);
  }
  /// The sums of all CTAs of the cluster, which have one tile together, to the first one. True: it
  /// is this one.
  FLASH_DEVICE bool gather(int size) {
    const uint32_t place = shared_address(shared.slot[0]) + threadIdx.x % 256 * 16;
    constexpr int kStep = 256 * 16;
    ptx::named_barrier_sync(1, 256);  // products of the other warpgroup have read the slots
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) ptx::store_shared_v4(place + j * kStep, &sums[4 * j]);
    ptx::cluster_sync();
    const bool is_first = ptx::cluster_rank() == 0;
    for (int rank = 1; is_first && rank < size; ++rank) {
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
        const float4 v = ptx::load_cluster_v4(place + j * kStep, rank);
        sums[4 * j] += v.x, sums[4 * j + 1] += v.y;
        sums[4 * j + 2] += v.z, sums[4 * j + 3] += v.w;
      }
    }
    ptx::cluster_sync();  // nobody ends before its sums are read
    return is_first;
  }
  FLASH_DEVICE void finish_tile(int index) {
    if (has_bias) {
      release(&shared.bias_empty[bias_ring.stage]);
      bias_ring.advance();
    }
    if (!has_blocks) {  // zeros
      const auto tile = Traits::Tile::of(p, index);
      set_place(tile.row, tile.col, tile.batch, tile.head);
    }
    has_blocks = has_bias = false;
    const int size = ptx::cluster_size();
    if (size > 1 && !gather(size)) return;
    if (p.features.score_mod.bias_is_float32) {
      store<float>();
    } else {
      store<Element>();
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = 0.f;
  }

  FLASH_DEVICE void run(int num_tiles) {
    const int size = ptx::cluster_size(), ctas = gridDim.x / size;
    for (int tile = blockIdx.x / size;;) {
      wait_for_slot();
      const PairBlock& block = shared.block[ring.stage];
      const int next = to_uniform(block.tile);
      for (; tile < next; tile += ctas) finish_tile(tile);
      if (next >= num_tiles) return;
      if (!has_blocks) begin_tile(block);
      add(block, shared_address(shared.bias[bias_ring.stage]));
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    bias_gradient_kernel(const __grid_constant__ BackwardMaps maps,
                         const __grid_constant__ BackwardParams p,
                         const __grid_constant__ BiasRows rows, int num_tiles) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(raw);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kSlots; ++i) {
      ptx::mbarrier_init(&shared.full[i], 1);
      ptx::mbarrier_init_for_warps(&shared.empty[i], Traits::kMmaWarps);
    }
    for (int i = 0; i < Traits::kBiasStages; ++i) {
      ptx::mbarrier_init(&shared.bias_full[i], 1);
      ptx::mbarrier_init_for_warps(&shared.bias_empty[i], Traits::kMmaWarps);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();  // barriers exist before any role touches them

  const int warpgroup = warp_uniform(threadIdx.x >> 7);
  if (warpgroup == 0) {
    ptx::shrink_registers<Traits::kLoadRegisters>();
    const int warp = warp_uniform(threadIdx.x >> 5);
    if (warp < 2 && threadIdx.x % 32 == 0)
      BlockLoads<Traits>{maps, p, rows, shared, warp == 0}.run(num_tiles);
  } else {
    ptx::grow_registers<Traits::kMmaRegisters>();
    BiasCompute<Traits>{maps,
                        p,
                        shared,
                        warpgroup - 1,
                        static_cast<int>(threadIdx.x & 31),
                        warp_uniform((threadIdx.x >> 5) & 3)}
        .run(num_tiles);
  }
}

}  // namespace flash::cuda::sm90
