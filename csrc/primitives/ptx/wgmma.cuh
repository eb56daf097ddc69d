// SPDX-License-Identifier: BSD-3-Clause
// Warpgroup matrix products (PTX ISA, "wgmma"): D[64 x N] (+)= A[64 x 16] B[16 x N], 16-bit inputs,
// fp32 accumulators, N / 2 of them per thread.
//   accumulator d[4 j + 2 r + c] = row 16 warp + lane / 4 + 8 r, column 8 j + 2 (lane % 4) + c
// An accumulator, packed to 16 bits, is an A operand of the next product without any exchange.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "primitives/device.cuh"

namespace flash::ptx {

/// Before the first product, and whenever ordinary code touched accumulators or A registers.
FLASH_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FLASH_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
FLASH_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

FLASH_DEVICE void pin_register(float& value) { asm volatile("" : "+f"(value)::"memory"); }
FLASH_DEVICE void pin_register(uint32_t& value) { asm volatile("" : "+r"(value)::"memory"); }

/// Compiler barrier on registers that an asynchronous product reads or writes: before issue, and
/// after the wait.
template <class T, int kCount>
FLASH_DEVICE void pin(T (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) pin_register(values[i]);
}

/// Shared-memory matrix descriptor without its address, 128-byte swizzle.
///   K-major operand, rows of 64 elements: leading = 16 (ignored), stride = 1024
///   MN-major operand (transposed):        leading = bytes between 64-element chunks, stride = 1024
__host__ FLASH_DEVICE constexpr uint64_t descriptor_layout(uint32_t leading_bytes,
                                                           uint32_t stride_bytes) {
  return uint64_t{1} << 62 | uint64_t{stride_bytes >> 4} << 32 | uint64_t{leading_bytes >> 4} << 16;
}
FLASH_DEVICE uint64_t descriptor(uint64_t layout, uint32_t address) {
  return layout | (address & 0x3ffff) >> 4;
}
FLASH_DEVICE uint64_t advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}
/// Byte offset of depth step i (16 elements) of a K-major tile stored as 64-column chunks of
/// `rows`.
__host__ FLASH_DEVICE constexpr uint32_t k_major_step(int i, int rows) {
  return i / 4 * rows * 128 + i % 4 * 32;
}
/// Byte offset of depth step i (16 rows) of an MN-major tile.
__host__ FLASH_DEVICE constexpr uint32_t mn_major_step(int i) { return i * 16 * 128; }

/// Wgmma<Element, N>: ss takes A from shared memory, rs from registers. The primary template stays
/// undefined, so that an N without an instruction does not compile.
template <class Element, int kN>
struct Wgmma;

// clang-format off
#define FLASH_D8(b) "+f"(d[b]), "+f"(d[b + 1]), "+f"(d[b + 2]), "+f"(d[b + 3]), \
                    "+f"(d[b + 4]), "+f"(d[b + 5]), "+f"(d[b + 6]), "+f"(d[b + 7])
#define FLASH_D16 FLASH_D8(0), FLASH_D8(8)
#define FLASH_D32 FLASH_D16, FLASH_D8(16), FLASH_D8(24)
#define FLASH_D40 FLASH_D32, FLASH_D8(32)
#define FLASH_D48 FLASH_D40, FLASH_D8(40)
#define FLASH_D64 FLASH_D48, FLASH_D8(48), FLASH_D8(56)
#define FLASH_D96 FLASH_D64, FLASH_D8(64), FLASH_D8(72), FLASH_D8(80), FLASH_D8(88)
#define FLASH_D128 FLASH_D96, FLASH_D8(96), FLASH_D8(104), FLASH_D8(112), FLASH_D8(120)
#define FLASH_N16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define FLASH_N32 FLASH_N16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define FLASH_N40 FLASH_N32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define FLASH_N48 FLASH_N40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define FLASH_N64 FLASH_N48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define FLASH_N96 FLASH_N64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79" \
  ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define FLASH_N128 FLASH_N96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
  ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// R = N / 2 accumulators; p0 ... p6 = R ... R + 6, the numbers of the operands that follow them.
#define FLASH_WGMMA(ELEMENT, TYPE, N, R, p0, p1, p2, p3, p4, p5, p6)                                \
  template <> struct Wgmma<ELEMENT, N> {                                                           \
    template <int kTransposeA, int kTransposeB>                                                    \
    static FLASH_DEVICE void ss(float (&d)[R], uint64_t a, uint64_t b, int accumulate) {           \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #p2 ", 0;\n"                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                 \
                   " {" FLASH_N##R "}, %" #p0 ", %" #p1 ", p, 1, 1, %" #p3 ", %" #p4 "; }"         \
                   : FLASH_D##R                                                                    \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeA), "n"(kTransposeB));         \
    }                                                                                              \
    template <int kTransposeB>                                                                     \
    static FLASH_DEVICE void rs(float (&d)[R], const uint32_t* a, uint64_t b, int accumulate) {    \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #p5 ", 0;\n"                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                 \
                   " {" FLASH_N##R "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4            \
                   ", p, 1, 1, %" #p6 "; }"                                                        \
                   : FLASH_D##R                                                                    \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),          \
                     "n"(kTransposeB));                                                            \
    }                                                                                              \
  };
#define FLASH_WGMMA_BOTH(...)                        \
  FLASH_WGMMA(__nv_bfloat16, "bf16", __VA_ARGS__)    \
  FLASH_WGMMA(__half, "f16", __VA_ARGS__)
FLASH_WGMMA_BOTH(32, 16, 16, 17, 18, 19, 20, 21, 22)
FLASH_WGMMA_BOTH(64, 32, 32, 33, 34, 35, 36, 37, 38)
FLASH_WGMMA_BOTH(80, 40, 40, 41, 42, 43, 44, 45, 46)
FLASH_WGMMA_BOTH(96, 48, 48, 49, 50, 51, 52, 53, 54)
FLASH_WGMMA_BOTH(128, 64, 64, 65, 66, 67, 68, 69, 70)
FLASH_WGMMA_BOTH(192, 96, 96, 97, 98, 99, 100, 101, 102)
FLASH_WGMMA_BOTH(256, 128, 128, 129, 130, 131, 132, 133, 134)
#undef FLASH_WGMMA_BOTH
#undef FLASH_WGMMA
// clang-format on

}  // namespace flash::ptx
