// SPDX-License-Identifier: BSD-3-Clause
// dQ in a kernel of its own, where sums of dQ in memory cost more than S and dP twice: above head
// dim 128, and for short sequences. Above 128 a CTA has registers for dK and dV of 64 keys only,
// each block of keys would add seqlen_q x head_dim x 4 bytes, and at 3 TB/s these additions alone
// cap head dim 256 at 480 TFLOP/s. So there are two kernels:
//   keys_kernel     dK, dV of 64 keys, against blocks of queries: S, dP, dV, dK;
//   queries_kernel  dQ of 128 queries, against blocks of keys:    S, dP, dQ.
// Seven products instead of five, but nothing to add, clear or convert, and every result has one
// writer: the same bits in every run.
#pragma once

#include "cuda/sm90/backward_traits.cuh"

namespace flash::cuda::sm90 {

// Rows of the tile table.
//   keys_kernel     blocks of kQueryBlock queries. Q comes in kQueryParts of its columns, of which
//                   kQuerySlots fit beside kStages of dO. The first kHeldSteps x 16 columns of K
//                   and of V stay in registers.
//   queries_kernel  blocks of kKeyBlock keys, stages of K and of V.
// bf16, 16k tokens, hidden 2048, one H200; docs/hopper.md has what lost.
struct SeparateTileD96 {  // short sequences: see is_separate in backward_plan.cpp
  static constexpr int kHeadDim = 96, kHeadDimV = 96;
  static constexpr int kQueryBlock = 128, kQueryParts = 1, kQuerySlots = 2, kStages = 2;
  static constexpr int kHeldSteps = 6;
  static constexpr int kKeyBlock = 96, kKeyStages = 3, kValueStages = 2;
};
struct SeparateTileD128 {  // the same
  static constexpr int kHeadDim = 128, kHeadDimV = 128;
  static constexpr int kQueryBlock = 128, kQueryParts = 1, kQuerySlots = 2, kStages = 2;
  static constexpr int kHeldSteps = 8;
  static constexpr int kKeyBlock = 96, kKeyStages = 3, kValueStages = 2;
};
struct SeparateTileD192 {  // all of K and V in registers: +3 to +7 %; 96 keys a block: -4 to +1 %
  static constexpr int kHeadDim = 192, kHeadDimV = 192;
  static constexpr int kQueryBlock = 64, kQueryParts = 1, kQuerySlots = 3, kStages = 3;
  static constexpr int kHeldSteps = 12;
  static constexpr int kKeyBlock = 64, kKeyStages = 3, kValueStages = 2;
};
struct SeparateTileD192V128 {  // against 64 queries +4 to +7 % from 4k, -3 % at 512; 96 keys +3 %
  static constexpr int kHeadDim = 192, kHeadDimV = 128;
  static constexpr int kQueryBlock = 128, kQueryParts = 1, kQuerySlots = 2, kStages = 2;
  static constexpr int kHeldSteps = 2;  // 4 serialise (C7512)
  static constexpr int kKeyBlock = 96, kKeyStages = 2, kValueStages = 2;
};
struct SeparateTileD256 {  // Q in halves +4 to +12 %; 96 columns of K and V held +1 to +2 %
  static constexpr int kHeadDim = 256, kHeadDimV = 256;
  static constexpr int kQueryBlock = 64, kQueryParts = 2, kQuerySlots = 5, kStages = 2;
  static constexpr int kHeldSteps = 6;
  static constexpr int kKeyBlock = 64, kKeyStages = 2, kValueStages = 1;
};

// General variant: registers hold values of a bias or mask beside the scores, shared memory tiles
// of them, kKeyPairStages for keys_kernel and kQueryPairStages for queries_kernel. At head dim 256
// the latter has room for them beside 32 keys, not 64.
struct SeparateTileD192General : SeparateTileD192 {
  static constexpr int kHeldSteps = 8;  // 12 serialise (C7512)
  static constexpr int kKeyStages = 2;
  static constexpr int kKeyPairStages = 2, kQueryPairStages = 2;
};
struct SeparateTileD192V128General : SeparateTileD192V128 {
  static constexpr int kQueryBlock = 64, kQuerySlots = 3, kStages = 3;
  static constexpr int kHeldSteps = 8;
  static constexpr int kKeyBlock = 64, kKeyStages = 3;
  static constexpr int kKeyPairStages = 2, kQueryPairStages = 2;
};
struct SeparateTileD256General : SeparateTileD256 {  // 4 halves of Q, 2 stages of pairs: the same
  static constexpr int kHeldSteps = 1;
  static constexpr int kKeyBlock = 32, kKeyStages = 3, kValueStages = 2;
  static constexpr int kKeyPairStages = 1, kQueryPairStages = 2;
};

template <class Element_, class Tile, Variant kVariant>
struct SeparateTraits : Tile {
  using Element = Element_;
  using Tile::kHeadDim, Tile::kHeadDimV;
  static constexpr bool kGeneral = kVariant == Variant::kGeneral;
  static constexpr int kChunks = (kHeadDim + 63) / 64, kChunksV = (kHeadDimV + 63) / 64;
  static constexpr int kThreads = 384, kLoadRegisters = 40, kMmaRegisters = 232;
  static constexpr int kMmaWarps = 8;
  static constexpr bool kSumsDq = false, kMayPrepare = false;
};

template <class Element, class Tile, Variant kVariant>
struct KeysTraits : SeparateTraits<Element, Tile, kVariant> {
  using Base = SeparateTraits<Element, Tile, kVariant>;
  using Base::kChunks, Base::kChunksV;
  static constexpr int kBlockM = Tile::kQueryBlock, kBlockN = 64;
  using Tile::kQueryParts, Tile::kQuerySlots, Tile::kStages;
  static constexpr int kPairStages = [] {
    if constexpr (Base::kGeneral) return Tile::kKeyPairStages;
    return 0;
  }();
  // The warpgroup of dV makes the general scores.
  static constexpr int kValuesRegisters = Base::kGeneral ? 256 : Base::kMmaRegisters;
  static constexpr int kKeysRegisters = Base::kGeneral ? 208 : Base::kMmaRegisters;

  struct SharedStorage {
    uint16_t k[kBlockN * kChunks * 64];
    uint16_t v[kBlockN * kChunksV * 64];
    uint16_t q[kQuerySlots][kBlockM * kChunks * 64 / kQueryParts];
    uint16_t dout[kStages][kBlockM * kChunksV * 64];
    uint32_t p[kBlockM * kBlockN / 2];  // P^T from thread to thread: [quarter][thread][4 pairs]
    [[no_unique_address]] PairStorage<kPairStages, kBlockM * kBlockN * 2> pairs;
    float lse_log2[kQuerySlots][kBlockM], delta[kStages][kBlockM];  // lse: with the first part
    uint64_t k_full, k_empty, v_full, v_empty;
    uint64_t q_full[kQuerySlots], q_empty[kQuerySlots], dout_full[kStages], dout_empty[kStages];
    uint64_t p_full, p_empty;
    uint64_t tile_full[2], tile_empty[2];
    int tile[2];  // index, -1: no more
  };
  static_assert(sizeof(SharedStorage) <= 232448, "exceeds the shared memory of one SM");
};

template <class Element, class Tile, Variant kVariant>
struct QueriesTraits : SeparateTraits<Element, Tile, kVariant> {
  using Base = SeparateTraits<Element, Tile, kVariant>;
  using Base::kChunks, Base::kChunksV;
  static constexpr int kBlockM = 128, kBlockN = Tile::kKeyBlock;
  static constexpr int kKeyStages = Tile::kKeyStages, kValueStages = Tile::kValueStages;
  static constexpr int kPairStages = [] {
    if constexpr (Base::kGeneral) return Tile::kQueryPairStages;
    return 0;
  }();

  struct SharedStorage {
    uint16_t q[kBlockM * kChunks * 64];
    uint16_t dout[kBlockM * kChunksV * 64];
    uint16_t k[kKeyStages][kBlockN * kChunks * 64];
    uint16_t v[kValueStages][kBlockN * kChunksV * 64];
    [[no_unique_address]] PairStorage<kPairStages, kBlockM * kBlockN * 2> pairs;
    float lse_log2[kBlockM], delta[kBlockM];
    uint64_t q_full, q_empty, dout_full, dout_empty;
    uint64_t k_full[kKeyStages], k_empty[kKeyStages];
    uint64_t k_clean[kKeyStages];  // general variant
    uint64_t v_full[kValueStages], v_empty[kValueStages];
    uint64_t tile_full[2], tile_empty[2];
    int tile[2];  // index, -1: no more
  };
  static_assert(sizeof(SharedStorage) <= 232448, "exceeds the shared memory of one SM");
};

}  // namespace flash::cuda::sm90
