// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "attention/platform.h"

namespace flash {

/// Philox4x32 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3; SC 2011).
struct PhiloxBlock {
  uint32_t x[4];
};

FLASH_HOST_DEVICE uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)  // of the expression, ptxas adds 0 to the upper half: 14 times a call
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t(a) * b;
#endif
}

template <int kRounds>
FLASH_HOST_DEVICE PhiloxBlock philox4x32(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product0 = wide_product(kMultiplier0, counter.x[0]);
    const uint64_t product1 = wide_product(kMultiplier1, counter.x[2]);
    counter = {{uint32_t(product1 >> 32) ^ counter.x[1] ^ key0, uint32_t(product1),
                uint32_t(product0 >> 32) ^ counter.x[3] ^ key1, uint32_t(product0)}};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

/// Dropout keyed by coordinates: whether the pair (q, k) of head h in sequence b is kept depends on
/// (seed, offset, b, h, q, k) alone, never on tiles, device, pass or packing.
///
/// One Philox call serves the 8 pairs {q, q+8} x {k, k+8, k+16, k+24} of a 16 x 32 block, which is
/// what one thread holds in an m16n8 accumulator:
///   counter = (offset + (b num_heads + h)) : (q' << 32 | k'),
///   q' = (q div 16) 8 + q mod 8,  k' = (k div 32) 8 + k mod 8,
///   half-word number 4 ((q mod 16) div 8) + (k mod 32) div 8.
/// A pair is kept iff its half-word is below `threshold` = round((1 - p) 65536).
struct Dropout {
  static constexpr int kRounds = 7;
  static constexpr uint64_t kKeyConstant = 0x666C6173685F6174ull;  // apart from torch's own streams

  const int64_t* rng_state = nullptr;  ///< (seed, offset), on the device of q; null: no dropout
  uint32_t threshold = 65536;          ///< kept half-words
  double scale = 1;                    ///< 1 / (1 - p); 0 for p = 1

  FLASH_HOST_DEVICE bool enabled() const { return rng_state != nullptr; }
};

/// The stream of one (sequence, head); made once per tile from Dropout::rng_state.
struct DropoutStream {
  uint64_t key, counter_low;
  uint32_t threshold;

  static FLASH_HOST_DEVICE DropoutStream of(const Dropout& dropout, int b, int h, int num_heads) {
    const uint64_t seed = uint64_t(dropout.rng_state[0]), offset = uint64_t(dropout.rng_state[1]);
    return {seed ^ Dropout::kKeyConstant, offset + uint64_t(b) * uint64_t(num_heads) + uint64_t(h),
            dropout.threshold};
  }
  /// The half-words of q's and k's 2 x 4 pairs; q and k may be any member of them.
  FLASH_HOST_DEVICE PhiloxBlock block(int q, int k) const {
    const uint32_t q_index = uint32_t(q) / 16 * 8 + uint32_t(q) % 8;
    const uint32_t k_index = uint32_t(k) / 32 * 8 + uint32_t(k) % 8;
    return philox4x32<Dropout::kRounds>(
        {{uint32_t(counter_low), uint32_t(counter_low >> 32), k_index, q_index}}, uint32_t(key),
        uint32_t(key >> 32));
  }
  /// Half-word of the pair in its block: row = (q mod 16) div 8, column = (k mod 32) div 8.
  FLASH_HOST_DEVICE bool keeps(const PhiloxBlock& block, int row, int column) const {
    const int half_word = 4 * row + column;
    // Selected, not indexed: an index that is not a constant puts the block in local memory.
    const uint32_t low = half_word & 2 ? block.x[1] : block.x[0];
    const uint32_t high = half_word & 2 ? block.x[3] : block.x[2];
    const uint32_t word = half_word & 4 ? high : low;
    return (half_word % 2 ? word >> 16 : word & 0xffffu) < threshold;
  }
  FLASH_HOST_DEVICE bool keep(int q, int k) const {
    return keeps(block(q, k), q % 16 / 8, k % 32 / 8);
  }
};

}  // namespace flash
