// SPDX-License-Identifier: BSD-3-Clause
//
// Tile registers (Intel AMX, "Advanced Matrix Extensions"): eight of 16 rows of 64 bytes, used as
//     A   16 x 32 numbers of bf16
//     B   16 x 16 pairs: row x holds the numbers 2x and 2x + 1 of each of 16 columns
//     C   16 x 16 floats, C += A B
// all rows and columns always: what a product lacks is padded. Denormal numbers count as 0, in
// products and in sums. Without the instructions the same is computed in memory, for tests, but for
// the order of the additions.
#pragma once

#include "cpu/tile.h"

namespace flash::cpu {
namespace {

constexpr int kLeftTile = 6, kRightTile = 7;  ///< A and B of a product; its sums are below

#if defined(__AMX_BF16__)

/// Eight tiles of full size, until the end of the scope. The configuration belongs to the thread,
/// and others (oneDNN) rely on theirs.
class TileScope {
 public:
  TileScope() {
    asm volatile("sttilecfg %0" : "=m"(outer_));
    Configuration full{};
    full.palette = 1;
    for (int t = 0; t < 8; ++t) full.row_bytes[t] = 64, full.rows[t] = 16;
    asm volatile("ldtilecfg %0" ::"m"(full));
  }
  ~TileScope() {
    if (outer_.palette) {
      asm volatile("ldtilecfg %0" ::"m"(outer_));
    } else {
      asm volatile("tilerelease");
    }
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  struct Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } outer_;
};

template <int kTile>
FLASH_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
/// 16 rows of 64 bytes, `stride` bytes apart.
template <int kTile>
FLASH_INLINE void tile_load(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
FLASH_INLINE void tile_store(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
FLASH_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

#else

static thread_local int tile_scopes;  ///< of the thread; without one, an instruction traps

struct TileScope {
  TileScope() { ++tile_scopes; }
  ~TileScope() { --tile_scopes; }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

union TileMemory {
  uint32_t pairs[16][16];
  float sums[16][16];
};
static thread_local TileMemory tiles_of_thread[8];
inline TileMemory& tile_memory(int tile) {
  if (!tile_scopes) __builtin_trap();
  return tiles_of_thread[tile];
}

template <int kTile>
FLASH_INLINE void tile_zero() {
  std::memset(&tile_memory(kTile), 0, sizeof(TileMemory));
}
template <int kTile>
FLASH_INLINE void tile_load(const void* rows, int64_t stride) {
  for (int r = 0; r < 16; ++r)
    std::memcpy(tile_memory(kTile).pairs[r], static_cast<const char*>(rows) + r * stride, 64);
}
template <int kTile>
FLASH_INLINE void tile_store(void* rows, int64_t stride) {
  for (int r = 0; r < 16; ++r)
    std::memcpy(static_cast<char*>(rows) + r * stride, tile_memory(kTile).pairs[r], 64);
}
template <int kC, int kA, int kB>
FLASH_INLINE void tile_multiply() {
  const auto normal = [](float x) { return __builtin_fabsf(x) < 0x1p-126f ? 0 * x : x; };
  const auto number = [&](uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return normal(x);
  };
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 16; ++c) {
      float& sum = tile_memory(kC).sums[r][c];
      for (int x = 0; x < 16; ++x) {
        const uint32_t a = tile_memory(kA).pairs[r][x], b = tile_memory(kB).pairs[x][c];
        sum = normal(sum + normal(number(a << 16) * number(b << 16)));
        sum = normal(sum + normal(number(a & 0xffff0000) * number(b & 0xffff0000)));
      }
    }
  }
}

#endif

template <int kFirst, int kEnd, bool kLoads>
FLASH_INLINE void begin_tiles(const float* from, int64_t pitch) {
  if constexpr (kFirst < kEnd) {
    if constexpr (kLoads) {
      tile_load<kFirst>(from, pitch * 4);
    } else {
      tile_zero<kFirst>();
    }
    begin_tiles<kFirst + 1, kEnd, kLoads>(from + 16, pitch);
  }
}
/// Tiles kFirst ... kEnd - 1 += A B, A the loaded one; B is 16 rows of pairs, (16, pitch), of which
/// each tile takes 16 columns.
template <int kFirst, int kEnd>
FLASH_INLINE void multiply_tiles(const char* pairs, int64_t pitch) {
  static_assert(kEnd <= kLeftTile);
  if constexpr (kFirst < kEnd) {
    tile_load<kRightTile>(pairs, pitch * 4);
    tile_multiply<kFirst, kLeftTile, kRightTile>();
    multiply_tiles<kFirst + 1, kEnd>(pairs + 64, pitch);
  }
}
template <int kFirst, int kEnd>
FLASH_INLINE void store_tiles(float* to, int64_t pitch) {
  if constexpr (kFirst < kEnd) {
    tile_store<kFirst>(to, pitch * 4);
    store_tiles<kFirst + 1, kEnd>(to + 16, pitch);
  }
}

/// out = A B or += A B: A one or two strips of 16 rows of bf16, a_stride bytes apart, of `steps`
/// times 32 columns; B in pairs, (16 steps, pitch); out (16 kStrips, out_pitch). Six tiles of sums
/// at most: eight loads for six products.
template <int kStrips, int kVectors, bool kAdds>
FLASH_INLINE void multiply_strips(const char* a, int64_t a_stride, const char* pairs, int64_t pitch,
                                  int steps, float* out, int64_t out_pitch) {
  float* second = out + 16 * out_pitch;
  begin_tiles<0, kVectors, kAdds>(out, out_pitch);
  if constexpr (kStrips == 2) begin_tiles<kVectors, 2 * kVectors, kAdds>(second, out_pitch);
  for (int step = 0; step < steps; ++step, a += 64, pairs += 16 * pitch * 4) {
    tile_load<kLeftTile>(a, a_stride);
    multiply_tiles<0, kVectors>(pairs, pitch);
    if constexpr (kStrips == 2) {
      tile_load<kLeftTile>(a + 16 * a_stride, a_stride);
      multiply_tiles<kVectors, 2 * kVectors>(pairs, pitch);
    }
  }
  store_tiles<0, kVectors>(out, out_pitch);
  if constexpr (kStrips == 2) store_tiles<kVectors, 2 * kVectors>(second, out_pitch);
}

}  // namespace
}  // namespace flash::cpu
