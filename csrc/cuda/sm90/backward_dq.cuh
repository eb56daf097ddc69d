// SPDX-License-Identifier: BSD-3-Clause
// How dQ leaves. The warpgroups put dQ of a block into shared memory; one warp adds it to fp32 sums
// in a ring of heads that stays in L2; two warps, otherwise idle, take query blocks in turn, wait
// until all key blocks have added, scale, round, and open the place for a later head: clear the
// sums and, where that pays, make its lse and delta. No dQ traffic to memory but the result.
#pragma once

#include "cuda/sm90/backward_prepare.cuh"
#include "primitives/numeric.cuh"
#include "primitives/ptx/global_memory.cuh"
#include "primitives/ptx/shared_memory.cuh"

namespace flash::cuda::sm90 {

FLASH_DEVICE int barrier_of(NamedBarrier barrier, int slice) {
  return static_cast<int>(barrier) + slice;
}

/// accdQ to shared memory, by the 128 threads of one warpgroup: float at 512 i + 4 thread + e is
/// accumulator 4 i + e. The adding warp empties the buffer, and is told when it is full.
template <class Traits>
FLASH_DEVICE void put_dq(typename Traits::SharedStorage& shared,
                         const float (&accdQ)[Traits::kDqN / 2], int slice) {
  const uint32_t dq =
      shared_address(shared.dq + slice * Traits::kSliceSize) + (threadIdx.x & 127) * 16;
  ptx::named_barrier_sync(barrier_of(NamedBarrier::kDqEmpty, slice), 160);
#pragma unroll
  for (int i = 0; i < Traits::kDqN / 8; ++i) ptx::store_shared_v4(dq + i * 2048, &accdQ[4 * i]);
  ptx::fence_proxy_async();
  ptx::named_barrier_arrive(barrier_of(NamedBarrier::kDqFull, slice), 160);
}

/// The leader of the adding warp counts, some blocks late, the additions that are complete;
/// ordered, every 128 queries, since the next key block waits for them: up to 9 % faster than every
/// 64, which takes more fences, and up to 24 % than every 256.
template <class Traits>
struct AdditionCounter {
  static constexpr int kBatch = 4, kOrderedBatch = 128 / Traits::kBlockM;
  int* const arrivals;
  int next = 0;  ///< block of the ring to be counted
  int uncounted = 0;

  FLASH_DEVICE void count(int blocks) {
    if (blocks <= 0) return;
    ptx::fence_gpu();
    for (int i = 0; i < blocks; ++i) ptx::add_relaxed(arrivals + next++);
    uncounted -= blocks;
  }
  FLASH_DEVICE void count_all() {
    ptx::bulk_wait_written<0>();
    count(uncounted);
  }
  FLASH_DEVICE void count_due(bool ordered) {
    if (ordered) {
      if (uncounted == kOrderedBatch) count_all();
    } else if (uncounted > kBatch) {
      ptx::bulk_wait_written<1>();
      count(kBatch);
    }
  }
};

/// Ordered, a whole warp: returns when it is the turn of this key block to add to `m_block`; the
/// end of the blocks from there on, at most 32, of which it is. Asking for one block at a time
/// would put a round trip to L2 into every step.
template <class Traits>
FLASH_DEVICE int wait_for_turn(const BackwardParams& p, const BackwardSchedule& schedule,
                               const BackwardTileId& tile, const int* arrivals, int generation,
                               int m_block) {
  const int mine = m_block + threadIdx.x % 32;
  const Range adding = adding_blocks<Traits>(p, tile.q, tile.k, mine);
  const int place =
      schedule.last_first ? adding.end - 1 - tile.n_block : tile.n_block - adding.begin;
  const int turn = generation * (adding.end - adding.begin) + place;
  uint32_t come;  // bit i: of block m_block + i
  do {
    const bool has_come = mine < tile.visit.end && ptx::load_acquire(arrivals + mine) >= turn;
    come = __ballot_sync(0xffffffffu, has_come);
  } while (!(come & 1));
  __syncwarp();  // the leader's additions come after the loads of all lanes
  ptx::fence_proxy_async_global();
  return m_block + (come == 0xffffffffu ? 32 : __ffs(~come) - 1);
}

/// One warp: dQ of every block of the CTA's tiles, in the order of the warpgroups.
template <class Traits>
FLASH_DEVICE void add_dq(const BackwardParams& p, const BackwardSchedule& schedule,
                         typename Traits::SharedStorage& shared) {
  const bool is_leader = threadIdx.x % 32 == 0;
  Ring<2> slot;
  AdditionCounter<Traits> counter{schedule.arrivals};
  for (int index; (index = next_tile(shared, slot)) >= 0;) {
    const BackwardTileId tile = backward_tile<Traits>(p, schedule, index);
    if (tile.visit.begin >= tile.visit.end) continue;
    for (int g = 0; g < p.gqa_ratio(); ++g) {
      const int head = tile.batch * p.num_heads + tile.head_k * p.gqa_ratio() + g;
      const auto [generation, dq_slot] = schedule.dq_slots.divide(head);
      const int first = dq_slot * schedule.num_m_blocks.value();  // of the blocks of the ring
      if (is_leader) wait_for_slot<Traits>(schedule, head);
      counter.next = first + tile.visit.begin;
      int turns_end = tile.visit.begin;
      __syncwarp();  // bar.arrive counts a diverged warp twice
#pragma unroll 1
      for (int m_block = tile.visit.begin; m_block < tile.visit.end; ++m_block) {
        for (int s = 0; s < Traits::kDqSlices; ++s)
          ptx::named_barrier_arrive(barrier_of(NamedBarrier::kDqEmpty, s), 160);
        if (is_leader) counter.count_due(schedule.ordered);
        __syncwarp();
        if (schedule.ordered && m_block >= turns_end)
          turns_end = wait_for_turn<Traits>(p, schedule, tile, schedule.arrivals + first,
                                            generation, m_block);
        for (int s = 0; s < Traits::kDqSlices; ++s) {
          ptx::named_barrier_sync(barrier_of(NamedBarrier::kDqFull, s), 160);
          if (is_leader) {
            ptx::bulk_reduce_add(schedule.dq_sums + int64_t{first + m_block} * Traits::kDqSize +
                                     s * Traits::kSliceSize,
                                 shared_address(shared.dq + s * Traits::kSliceSize),
                                 Traits::kSliceSize * 4, ptx::kEvictLast);
          }
        }
        if (is_leader) {
          ptx::bulk_commit();
          ptx::bulk_wait_read<0>();
          ++counter.uncounted;
        }
        __syncwarp();
      }
      if (is_leader) counter.count_all();
    }
  }
  if (is_leader) ptx::bulk_wait_written<0>();
}

/// v[i] = v[i ^ by].
FLASH_DEVICE void exchange(uint32_t (&v)[4], int by) {
#pragma unroll
  for (int step = 1; step <= 2; ++step) {
    const uint32_t u[4] = {v[0], v[1], v[2], v[3]};
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = by & step ? u[i ^ step] : u[i];
  }
}

/// A part of one half of dQ of a block: dq = scale * sums, out of register order. `sums` lies in
/// shared memory. A lane takes 8 columns of two rows: four pieces of 16 bytes, of which eight lanes
/// read different ones, so that they meet different banks.
template <class Traits>
FLASH_DEVICE void round_dq_part(const BackwardParams& p, const BackwardSchedule& schedule,
                                uint32_t sums, int head_index, int m_block, int half, int part) {
  using Element = typename Traits::Element;
  constexpr int kSteps = Traits::kDqSize / 1024 / Traits::kConvertParts;  // of 8 columns
  if (!p.dq.data) return;
  const int lane = threadIdx.x % 32, turn = lane % 8 / 2;
  const int first_row =
      m_block * Traits::kBlockM + (Traits::kDqSplitsRows ? half * 64 : 0) + lane % 8;
  // Split by columns or not at all: the second half starts at column kHeadDim / 2.
  const int first_column =
      (Traits::kDqSplitsRows ? 0 : half * (Traits::kHeadDim / 2)) + part * kSteps * 8;
  const auto [batch, head] = schedule.heads.divide(head_index);
  const Sequence sequence = Sequence::of(p.q_layout, batch);
  auto* dq = static_cast<uint16_t*>(p.dq.data) + p.dq.offset(sequence, head) +
             first_row * p.dq.row_stride + first_column;
  const int rows = sequence.length - first_row, columns = p.head_dim - first_column;
  const float scale = static_cast<float>(p.softmax_scale);
  const uint32_t first_piece = sums + lane % 8 * 64 + turn * 16;
#pragma unroll 1
  for (int i = lane / 8; i < kSteps * 4; i += 4) {
    const int w = i / kSteps, c = i % kSteps;
    uint32_t pieces[4][4], low[4], high[4];  // rows 16 w and 16 w + 8
#pragma unroll
    for (int j = 0; j < 4; ++j)
      ptx::load_shared_v4(pieces[j], (first_piece + (c * 4 + w) * 512) ^ (j * 16));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const auto scaled = [&](int e) { return __uint_as_float(pieces[j][e]) * scale; };
      low[j] = pack<Element>(scaled(0), scaled(1));
      high[j] = pack<Element>(scaled(2), scaled(3));
    }
    exchange(low, turn);
    exchange(high, turn);
    if (c * 8 >= columns) continue;
    uint16_t* to = dq + w * 16 * p.dq.row_stride + c * 8;
    if (w * 16 < rows) ptx::store_global_v4(to, low);
    if (w * 16 + 8 < rows) ptx::store_global_v4(to + 8 * p.dq.row_stride, high);
  }
}

/// Half of a block of queries, `work` of all heads, gets its place in the ring.
template <class Traits>
FLASH_DEVICE void open_half(const BackwardMaps& maps, const BackwardParams& p,
                            const BackwardSchedule& schedule,
                            typename Traits::SharedStorage& shared, int work, int half,
                            int& parity) {
  const int lane = threadIdx.x % 32;
  const auto [head_index, m_block] = schedule.num_m_blocks.divide(work);
  const int dq_slot = schedule.dq_slots.remainder(head_index);
  const bool prepares = prepares_inside<Traits>(schedule);
  if (prepares) fetch_half<Traits>(maps, p, schedule, shared, head_index, m_block, half);
  const int64_t block = int64_t{dq_slot} * schedule.num_m_blocks.value() + m_block;
  auto* sums = reinterpret_cast<float4*>(schedule.dq_sums + block * Traits::kDqSize +
                                         half * (Traits::kDqSize / 2));
#pragma unroll 4
  for (int i = lane; i < Traits::kDqSize / 8; i += 32) __stcg(sums + i, float4{});
  if (prepares) {
    ptx::mbarrier_wait(&shared.converted_full[half], parity);
    parity ^= 1;
    prepare_half<Traits>(p, schedule, shared, head_index, m_block, half);
  }
  __syncwarp();
  if (lane == 0) {
    ptx::fence_gpu();
    ptx::add_relaxed(schedule.opened + dq_slot);
  }
}

/// The next one, known to lane 0 of a warp.
FLASH_DEVICE int draw(int* counter) { return threadIdx.x % 32 == 0 ? atomicAdd(counter, 1) : 0; }

/// Two warps, `half` = 0 or 1, draw query blocks of all heads in turn: "whoever adds last converts"
/// gives all of it to the slowest CTA. Each is drawn while the one before it is converted: drawn at
/// its start, causal rows up to 2k lose 8 to 10 %.
template <class Traits>
FLASH_DEVICE void convert_dq(const BackwardMaps& maps, const BackwardParams& p,
                             const BackwardSchedule& schedule,
                             typename Traits::SharedStorage& shared, int half) {
  constexpr int kSize = Traits::kDqSize / 2, kPartSize = kSize / Traits::kConvertParts;
  const int lane = threadIdx.x % 32, heads = p.batch * p.num_heads;
  const int num_m_blocks = schedule.num_m_blocks.value();
  const int blocks = heads * num_m_blocks;
  const int ring_blocks = schedule.dq_slots.value() * num_m_blocks;
  int parity = 0;
  if (prepares_inside<Traits>(schedule)) {
#pragma unroll 1
    for (int work; (work = warp_uniform(draw(schedule.drawn->opened + half))) < ring_blocks;)
      open_half<Traits>(maps, p, schedule, shared, work, half, parity);
  }
#pragma unroll 1
  for (int next = draw(schedule.drawn->converted + half), work;
       (work = warp_uniform(next)) < blocks;) {
    next = draw(schedule.drawn->converted + half);
    const auto [head_index, m_block] = schedule.num_m_blocks.divide(work);
    const auto [generation, dq_slot] = schedule.dq_slots.divide(head_index);
    const int64_t block = int64_t{dq_slot} * num_m_blocks + m_block;
    if (lane == 0) {
      const int batch = schedule.heads.quotient(head_index);
      const Range adding = adding_blocks<Traits>(p, Sequence::of(p.q_layout, batch),
                                                 Sequence::of(p.k_layout, batch), m_block);
      const int needed = (generation + 1) * (adding.end - adding.begin);
      while (ptx::load_acquire(schedule.arrivals + block) < needed) __nanosleep(100);
      // Where nobody adds, nothing so far says that the place is this head's: opened for later
      // heads in advance, such a block would be counted in place of another one of this head.
      if (adding.begin >= adding.end) wait_for_slot<Traits>(schedule, head_index);
      ptx::fence_proxy_async_global();
    }
    const float* sums = schedule.dq_sums + block * Traits::kDqSize + half * kSize;
#pragma unroll 1
    for (int part = 0; part < Traits::kConvertParts; ++part, sums += kPartSize) {
      if (lane == 0) {
        ptx::mbarrier_expect_bytes(&shared.converted_full[half], kPartSize * 4);
        ptx::bulk_load(shared_address(shared.converted[half]), sums, kPartSize * 4,
                       &shared.converted_full[half]);
      }
      __syncwarp();
      ptx::mbarrier_wait(&shared.converted_full[half], parity);
      parity ^= 1;
      round_dq_part<Traits>(p, schedule, shared_address(shared.converted[half]), head_index,
                            m_block, half, part);
      __syncwarp();
    }
    if (work + ring_blocks < blocks)
      open_half<Traits>(maps, p, schedule, shared, work + ring_blocks, half, parity);
  }
}

}  // namespace flash::cuda::sm90
