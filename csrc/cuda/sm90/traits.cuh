// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cuda.h>

#include "attention/params.h"
#include "cuda/sm90/tma_tensor.h"
#include "primitives/ptx/mbarrier.cuh"
#include "primitives/ptx/named_barrier.cuh"
#include "primitives/ptx/tma.cuh"
#include "primitives/ptx/wgmma.cuh"

namespace flash::cuda::sm90 {

// Rows of the tile table. A row is a type because nvcc writes no host stub for a kernel template
// with a struct value as its argument.
//   kMmaWarpgroups   each owns 64 query rows: kBlockM = 64 kMmaWarpgroups
//   kBlockN          keys of a block
//   kStages          blocks of K and V together; odd: they share a ring, even: one each
//   kHeadDimV        columns of V, if fewer than those of Q and K
//   kQueryStages     2 or more: a tile begins under the last product of the tile before it
//   kTakeTurns       order the products of the warpgroups
//   kPairStages      general variant: of tiles of a bias or mask
// bf16, 16k tokens, hidden 2048, one H100; docs/hopper.md has what lost.
struct TileD64Short {  // 256x64 against 192x128: +10 % up to 1k, equal to 4k, -5 % from 8k
  // 8 stages: causal -7 % at 512, -5 % at 1k; 8 of one ring: -1 % full, twice the positions to move
  static constexpr int kMmaWarpgroups = 4, kBlockN = 64, kStages = 12, kQueryStages = 3;
  static constexpr bool kTakeTurns = true;
};
struct TileD64ShortCausal : TileD64Short {  // turns cost causal 4 % up to 1k
  static constexpr bool kTakeTurns = false;
};
struct TileD64Long {
  static constexpr int kMmaWarpgroups = 3, kBlockN = 128, kStages = 6, kQueryStages = 3;
  static constexpr bool kTakeTurns = true;
};
struct TileD96Short {  // one ring of 5 for two of 2: +4 to 11 %
  static constexpr int kMmaWarpgroups = 2, kBlockN = 128, kStages = 5, kQueryStages = 2;
  static constexpr bool kTakeTurns = true;
};
struct TileD96Long {  // against 128x128: full +9 to 12 %, causal +4 %; -5 to -10 % up to 1k
  static constexpr int kMmaWarpgroups = 3, kBlockN = 96, kStages = 5, kQueryStages = 2;
  static constexpr bool kTakeTurns = true;
};
struct TileD128 {  // 192x64 full 2k +4 %, causal -3 to -10 %; 128x144 -5 %, 128x176 -7 % at 8k
  // Two rings of 2 and 3 stages of Q: -6 to -8 % up to 1k, -3 % at 2k; causal 512 +2 %
  static constexpr int kMmaWarpgroups = 2, kBlockN = 128, kStages = 5, kQueryStages = 2;
  static constexpr bool kTakeTurns = true;
};
struct TileD192 {  // 128x96 with one stage of Q, K first: -5 % at 512, -1 % at 16k
  static constexpr int kMmaWarpgroups = 2, kBlockN = 64, kStages = 5, kQueryStages = 2;
  static constexpr bool kTakeTurns = true;
};
struct TileD192Values128 {  // 128x80: -9 to -11 % at 512, -2 % at 2k, equal at 16k
  static constexpr int kHeadDimV = 128;
  static constexpr int kMmaWarpgroups = 2, kBlockN = 64, kStages = 5, kQueryStages = 2;
  static constexpr bool kTakeTurns = true;
};
struct TileD256 {  // 128x80 loses up to 4 %, two stages of Q and one ring of 3 about 9 %
  static constexpr int kMmaWarpgroups = 2, kBlockN = 64, kStages = 4, kQueryStages = 1;
  static constexpr bool kTakeTurns = true;
};

// General variant: registers hold addresses beside the scores, shared memory tiles of a bias or
// mask.
struct TileD64General {  // 128x128 -20 %; without turns -3 %
  static constexpr int kMmaWarpgroups = 3, kBlockN = 64, kStages = 6, kQueryStages = 3;
  static constexpr bool kTakeTurns = true;
  static constexpr int kPairStages = 2;
};
struct TileD64Products : TileD64Short {  // 192x64: mask -30 %, dropout -10 to -15 %
  static constexpr int kStages = 8, kPairStages = 2;
  static constexpr bool kOfProducts = true;
};
struct TileD96General : TileD96Short {
  static constexpr int kStages = 4, kPairStages = 1;
};
struct TileD128General : TileD128 {  // 128x128 -4 %
  static constexpr int kBlockN = 64, kStages = 4, kPairStages = 2;
};
struct TileD128Products : TileD128General {
  static constexpr bool kOfProducts = true;
};
struct TileD192General : TileD192 {
  static constexpr int kStages = 4, kQueryStages = 1, kPairStages = 2;
};
struct TileD256General : TileD256 {
  static constexpr int kPairStages = 2;
};

/// Tiles of a tensor over pairs; nothing without stages.
template <int kStages, int kBytes>
struct PairStorage {
  alignas(1024) uint8_t tile[kStages][kBytes];
  uint64_t full[kStages], empty[kStages];
};
template <int kBytes>
struct PairStorage<0, kBytes> {};

/// What the load thread leaves beside a stage of Q for everyone else.
struct TileId {
  static constexpr int kStop = -1;    ///< in place of m_block: no more tiles
  static constexpr int kFinish = -2;  ///< finish the tile in hand, then ask again

  int m_block, head, batch;
  int index;  ///< of the schedule; its complement when the tile is done again
  Sequence q, k;
  int diagonal;  ///< key of k on the diagonal of query 0
  Range visit;   ///< blocks of keys, walked from the last to the first

  FLASH_DEVICE bool is_redo() const { return index < 0; }
};

/// Which rows of a warp need the safe exponent: bit l of lanes[r] is row r of the two of lane l.
struct UnsafeRows {
  uint32_t lanes[2];

  FLASH_DEVICE bool any() const { return (lanes[0] | lanes[1]) != 0; }
  FLASH_DEVICE bool has(int r) const { return lanes[r] >> threadIdx.x % 32 & 1; }
};

/// Position in a ring of stages; the parity flips at each wrap.
template <int kStages>
struct Ring {
  int stage = 0, parity = 0;

  FLASH_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// Where a block of K or V lies, and the parity of its barriers.
struct Place {
  int stage, parity;
};

/// Places of the blocks of a tile in the order of loads and products, where V follows K by one:
/// K(last), {K(n), V(n + 1)} ..., V(first). keys and values give the next one; step gives both of a
/// pair; last_values is for the V without a K before it.
///
/// One ring: every stage is of use for whatever comes next.
template <int kStages>
struct OneRing {
  /// After the V in hand come K, K, V, K, V ... of a tile: its n blocks that are left out, before
  /// that V is given back, need 2 n + 2 stages.
  static constexpr int kMostSkipped = (kStages - 3) / 2;
  Ring<kStages> at{kStages - 1, 1};  // of the block before

  FLASH_DEVICE Place keys() {
    at.advance();
    return {at.stage, at.parity};
  }
  FLASH_DEVICE Place values() { return keys(); }
  FLASH_DEVICE Place last_values() { return keys(); }
  FLASH_DEVICE void step(Place& k, Place& v) {
    k = keys();
    v = values();
  }
};

/// A ring each: one position to move in a step, not two.
template <int kStages>
struct TwoRings {
  static constexpr int kHalf = kStages / 2, kMostSkipped = kHalf - 1;
  Ring<kHalf> at{kHalf - 1, 1};  // of the K before

  FLASH_DEVICE Place keys() {
    at.advance();
    return {at.stage, at.parity};
  }
  FLASH_DEVICE Place values() const {
    return at.stage == 0 ? Place{kStages - 1, at.parity ^ 1}
                         : Place{kHalf + at.stage - 1, at.parity};
  }
  FLASH_DEVICE Place last_values() const { return {kHalf + at.stage, at.parity}; }
  FLASH_DEVICE void step(Place& k, Place& v) {
    v = last_values();
    k = keys();
  }
};

template <class Element_, int kHeadDim_, class Tile, Variant kVariant>
struct ForwardTraits : Tile {
  using Element = Element_;
  static constexpr bool kGeneral = kVariant == Variant::kGeneral;
  // General: scores pass through the hooks of score_mod, or are products of which a mask that comes
  // as tiles may drop some; those have the softmax of the plain variant.
  static constexpr bool kMasksProducts = kGeneral && requires { Tile::kOfProducts; };
  static constexpr bool kHooks = kGeneral && !kMasksProducts;
  static constexpr int kHeadDim = kHeadDim_;  // bucket: TMA fills columns beyond head_dim with 0
  static constexpr int kHeadDimV = [] {
    if constexpr (requires { Tile::kHeadDimV; }) return Tile::kHeadDimV;
    return kHeadDim;
  }();
  static constexpr int kBlockM = 64 * Tile::kMmaWarpgroups;
  // Of 64 columns = the swizzle's 128 bytes.
  static constexpr int kChunks = (kHeadDim + 63) / 64, kChunksV = (kHeadDimV + 63) / 64;
  static constexpr int kThreads = 128 * (1 + Tile::kMmaWarpgroups);
  using KeyValueRing =
      std::conditional_t<Tile::kStages % 2 == 0, TwoRings<Tile::kStages>, OneRing<Tile::kStages>>;
  // With stages of Q to spare, O leaves through its own rows of Q and a tile whose cheap softmax
  // was not safe can be done again. With one, O goes straight to global memory.
  static constexpr bool kStoresThroughQ = Tile::kQueryStages > 1;
  // In the general variant this costs 9 registers of the products, which spill at head dim 256.
  static constexpr bool kKeysFirst = !kStoresThroughQ && !kGeneral;
  static constexpr int kPairStages = [] {
    if constexpr (kGeneral) return Tile::kPairStages;
    return 0;
  }();
  // Dropout's bits are found under the products, unless O needs the registers.
  static constexpr bool kDrawsEarly = kGeneral && kHeadDimV <= 192;
  static constexpr bool kMayRedo = kStoresThroughQ && !kHooks;
  // bf16 weights have the exponents of fp32: they need not stay below 1 (see forward_softmax.cuh).
  static constexpr bool kKeepsMaximum = kMayRedo && std::is_same_v<Element, __nv_bfloat16>;
  static constexpr int kLoadRegisters = Tile::kMmaWarpgroups == 2 ? 40 : 32;
  static constexpr int kMmaRegisters = Tile::kMmaWarpgroups == 2   ? 232
                                       : Tile::kMmaWarpgroups == 3 ? 160
                                                                   : 112;
  static_assert(kHeadDim % 32 == 0 && kHeadDim <= 256, "wgmma and the swizzle need this");
  static_assert(kHeadDimV % 32 == 0 && kHeadDimV <= kHeadDim, "V fits where K does, O where Q");
  static_assert(Tile::kMmaWarpgroups >= 2 && Tile::kMmaWarpgroups <= 4,
                "register budgets are known for two to four warpgroups");

  /// Every tile starts at a multiple of 1024 bytes, the repeat of the swizzle. A tile of R rows is
  /// kChunks chunks of R rows of 128 bytes.
  struct SharedStorage {
    uint16_t q[Tile::kQueryStages][kBlockM * kChunks * 64];  // later O, each warpgroup its rows
    uint16_t kv[Tile::kStages][Tile::kBlockN * kChunks * 64];
    PairStorage<kPairStages, (kHooks ? 2 : 1) * kBlockM * Tile::kBlockN> pairs;
    TileId tile[Tile::kQueryStages];
    int failed[Tile::kQueryStages];  // index of the tile to be done again, or -1
    UnsafeRows marks[Tile::kQueryStages][4 * Tile::kMmaWarpgroups];  // its rows that are why
    uint64_t q_full[Tile::kQueryStages], q_empty[Tile::kQueryStages];
    uint64_t o_full[Tile::kQueryStages][Tile::kMmaWarpgroups];
    uint64_t kv_full[Tile::kStages], kv_empty[Tile::kStages];
    uint64_t kv_clean[Tile::kStages];  // general variant
  };
  static_assert(sizeof(SharedStorage) <= 232448, "exceeds the shared memory of one SM");
};

FLASH_DEVICE void release(uint64_t* barrier) { ptx::mbarrier_release(barrier); }

/// A value that steers a loop, told to ptxas to be equal in all lanes (REDUX writes a uniform
/// register). Without it, ring positions and descriptors of the main loop leave the uniform
/// registers: 44 R2UR a step, 6-11 % slower.
FLASH_DEVICE int to_uniform(int value) {
  return static_cast<int>(__reduce_or_sync(0xffffffffu, static_cast<unsigned>(value)));
}

}  // namespace flash::cuda::sm90
