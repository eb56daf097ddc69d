// SPDX-License-Identifier: BSD-3-Clause
//
// The few vector operations that the kernels need, for the instruction set that this translation
// unit is compiled for:
//   AVX-512   -mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mf16c
//   AVX2      -mavx2 -mfma -mf16c
//   other     no flag: GCC/Clang vector extensions, 16 bytes (SSE2 on x86-64, NEON on ARM64)
// A vector holds `Real`s: float, or what the unit defines FLASH_CPU_REAL as.
//
// Everything is in an unnamed namespace and always inlined. A function that reached the linker from
// two objects of different instruction sets would be kept once, in either form, and an older CPU
// would die of the wrong one. For the same reason kernels call no std:: template.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/exp2_polynomial.h"

#ifndef FLASH_CPU_REAL
#define FLASH_CPU_REAL float
#endif
#define FLASH_INLINE static inline __attribute__((always_inline))
#define FLASH_NOINLINE static __attribute__((noinline))
#define FLASH_UNROLL _Pragma("GCC unroll 16")

namespace flash::cpu {
namespace {

using Real = FLASH_CPU_REAL;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / sizeof(Real);

/// Integers of the width of a Real.
template <int kBytes>
struct IntegersOf;
template <>
struct IntegersOf<4> {
  using Signed = int32_t;
  using Unsigned = uint32_t;
};
template <>
struct IntegersOf<8> {
  using Signed = int64_t;
  using Unsigned = uint64_t;
};
using Int = IntegersOf<sizeof(Real)>::Signed;
using Bits = IntegersOf<sizeof(Real)>::Unsigned;

typedef Real Vector __attribute__((vector_size(kVectorBytes)));
typedef Int IntVector __attribute__((vector_size(kVectorBytes)));  // also the result of a compare
typedef Bits BitVector __attribute__((vector_size(kVectorBytes)));

/// The format of Real: 2^kExponentBias is where exponents are counted from, and
/// 1.5 * 2^kMantissaBits added to t leaves round(t) in the low bits of the sum.
template <class T>
struct FormatOf;
template <>
struct FormatOf<float> {
  static constexpr int kMantissaBits = 23, kExponentBias = 127;
  static constexpr float kRoundingShift = 12582912.f;
};
template <>
struct FormatOf<double> {
  static constexpr int kMantissaBits = 52, kExponentBias = 1023;
  static constexpr double kRoundingShift = 6755399441055744.0;
};
using Format = FormatOf<Real>;

constexpr Real kInfinity = Real(__builtin_inf());
constexpr Real kLog2E = Real(1.4426950408889634074);
constexpr Real kLn2 = Real(0.69314718055994530942);

FLASH_INLINE int smaller(int a, int b) { return a < b ? a : b; }
FLASH_INLINE int larger(int a, int b) { return a > b ? a : b; }

FLASH_INLINE Vector load(const Real* p) {
  Vector x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
FLASH_INLINE void store(Real* p, Vector x) { std::memcpy(p, &x, sizeof x); }
FLASH_INLINE IntVector load(const Int* p) {
  IntVector x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
FLASH_INLINE void store(Int* p, IntVector x) { std::memcpy(p, &x, sizeof x); }
/// Minus zero, not plus: x + 0 would turn -0 into +0.
FLASH_INLINE Vector splat(Real x) { return x - Vector{}; }
FLASH_INLINE BitVector bits_of(Vector x) {
  BitVector bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
FLASH_INLINE Vector from_bits(BitVector bits) {
  Vector x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
FLASH_INLINE IntVector lane_numbers() {
  IntVector index{};
  for (int lane = 0; lane < kLanes; ++lane) index[lane] = lane;
  return index;
}
/// condition has all bits of a lane set or none.
FLASH_INLINE Vector select(IntVector condition, Vector if_true, Vector if_false) {
  return condition ? if_true : if_false;
}
/// b where the two are unordered: a running maximum b ignores a NaN in a.
FLASH_INLINE Vector largest(Vector a, Vector b) { return a > b ? a : b; }
FLASH_INLINE Real sum_of_lanes(Vector x) {
  Real sum = 0;
  FLASH_UNROLL
  for (int lane = 0; lane < kLanes; ++lane) sum += x[lane];
  return sum;
}

/// What __builtin_shuffle(a, b, .) exchanges between a and b: with half = 0, lanes whose number has
/// not the bit `stride` come from a and the others from the place `stride` lower in b; with half =
/// 1 from the places `stride` higher than that.
FLASH_INLINE IntVector exchange_indices(int stride, int half) {
  IntVector from{};
  FLASH_UNROLL
  for (int lane = 0; lane < kLanes; ++lane) {
    from[lane] = (lane & ~stride) + half * stride + (lane & stride ? kLanes : 0);
  }
  return from;
}
/// x[r][c] <-> x[c][r]
template <int kStride = 1>
FLASH_INLINE void transpose(Vector (&x)[kLanes]) {
  if constexpr (kStride < kLanes) {
    const IntVector low = exchange_indices(kStride, 0), high = exchange_indices(kStride, 1);
    FLASH_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      if (i & kStride) continue;
      const Vector a = x[i], b = x[i + kStride];
      x[i] = __builtin_shuffle(a, b, low);
      x[i + kStride] = __builtin_shuffle(a, b, high);
    }
    transpose<kStride * 2>(x);
  }
}
/// to[c * pitch + r] = row(r)[c], where read(r, c, count, line) fills `line` with the numbers c ...
/// of row r. Rows up to the next whole vector become 0.
template <class To, class Read>
FLASH_INLINE void transpose_rows(int rows, int columns, int64_t pitch, To* to, Read&& read) {
  static_assert(sizeof(To) == sizeof(Real));
  for (int r = 0; r < rows; r += kLanes) {
    for (int c = 0; c < columns; c += kLanes) {
      To tile[kLanes][kLanes] = {};
      const int count = smaller(kLanes, columns - c);
      for (int line = 0; line < smaller(kLanes, rows - r); ++line) {
        count == kLanes ? read(r + line, c, kLanes, tile[line])
                        : read(r + line, c, count, tile[line]);
      }
      Vector x[kLanes];
      std::memcpy(x, tile, sizeof x);
      transpose(x);
      for (int line = 0; line < count; ++line) {
        std::memcpy(to + (c + line) * pitch + r, &x[line], sizeof(Vector));
      }
    }
  }
}

/// One scalar from memory in every lane. On AVX-512 gcc prefers to fold the broadcast into each
/// multiply that uses it: as many loads as vectors instead of one per row of a tile. The empty asm
/// forces the value into a register first.
FLASH_INLINE Vector broadcast(const Real* p) {
  Vector x = splat(*p);
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#endif
  return x;
}

// a b + c with one rounding where the hardware has it.
#if defined(__AVX512F__)
FLASH_INLINE __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
FLASH_INLINE __m512d fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX2__) && defined(__FMA__)
FLASH_INLINE __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
FLASH_INLINE __m256d fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
#elif defined(__aarch64__)
FLASH_INLINE float32x4_t fma(float32x4_t a, float32x4_t b, float32x4_t c) {
  return vfmaq_f32(c, a, b);
}
FLASH_INLINE float64x2_t fma(float64x2_t a, float64x2_t b, float64x2_t c) {
  return vfmaq_f64(c, a, b);
}
#else
FLASH_INLINE Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
#endif

/// t = n + f with n = round(t), exactly, and |f| <= 1/2.
struct Exp2Argument {
  Vector n, f;
  BitVector exponent;  ///< n in the exponent field (not on AVX-512, which has scalef)
};
FLASH_INLINE Exp2Argument split_exponent(Vector t) {
#if defined(__AVX512DQ__)
  // The forms without a mask warn in gcc 12. f of -inf is 0.
  Vector f;
  if constexpr (sizeof(Real) == 4) {
    f = (Vector)_mm512_maskz_reduce_ps(0xffff, (__m512)t, _MM_FROUND_TO_NEAREST_INT);
  } else {
    f = (Vector)_mm512_maskz_reduce_pd(0xff, (__m512d)t, _MM_FROUND_TO_NEAREST_INT);
  }
  return {t - f, f, BitVector{}};
#else
  const Vector shifted = t + splat(Format::kRoundingShift);
  const Vector n = shifted - splat(Format::kRoundingShift);
  return {n, t - n, bits_of(shifted) << Format::kMantissaBits};
#endif
}
/// 2^f - 1, accurate relative to itself.
FLASH_INLINE Vector exp2_minus_one(Vector f) {
  using Polynomial = Exp2Polynomial<Real>;
  Vector p = splat(Polynomial::kCoefficient[Polynomial::kDegree]);
  FLASH_UNROLL
  for (int i = Polynomial::kDegree - 1; i >= 1; --i) {
    p = fma(p, f, splat(Polynomial::kCoefficient[i]));
  }
  return p * f;
}

/// 2^t for t < 128 (1024 for double); exactly 0 where 2^t would not be normal, -inf included; NaN
/// for NaN.
///
/// Without that cut some weights would be denormal, and each product with one costs about a hundred
/// cycles: attention over scores of +-30 ran ten to twenty times slower. Cutting the weights is
/// free; switching the thread to flush-to-zero instead would flush the user's data too.
FLASH_INLINE Vector exp2_bounded(Vector t) {
  using Polynomial = Exp2Polynomial<Real>;
  constexpr Real kLeast = Real(1 - Format::kExponentBias);
  const Exp2Argument x = split_exponent(t);
  Vector p = splat(Polynomial::kCoefficient[Polynomial::kDegree]);
  FLASH_UNROLL
  for (int i = Polynomial::kDegree - 1; i >= 0; --i) {
    p = fma(p, x.f, splat(Polynomial::kCoefficient[i]));
  }
#if defined(__AVX512DQ__)
  if constexpr (sizeof(Real) == 4) {
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)t, (__m512)splat(kLeast), _CMP_NLT_UQ);
    return (Vector)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)x.n);
  } else {
    const __mmask8 normal = _mm512_cmp_pd_mask((__m512d)t, (__m512d)splat(kLeast), _CMP_NLT_UQ);
    return (Vector)_mm512_maskz_scalef_pd(normal, (__m512d)p, (__m512d)x.n);
  }
#else
  return select(t < splat(kLeast), splat(0), from_bits(bits_of(p) + x.exponent));
#endif
}
/// 2^t for any t: as exp2_bounded, and +inf where it overflows.
FLASH_INLINE Vector exp2_of(Vector t) {
  const Vector bound = splat(Real(Format::kExponentBias + 1));
  return select(t >= bound, splat(kInfinity), exp2_bounded(t));
}

FLASH_INLINE Vector abs_of(Vector x) { return from_bits(bits_of(x) & (Bits(-1) >> 1)); }
/// tanh |x| = e / (e + 2) with e = 2^t - 1, t = 2 |x| log2 e; from |x| = 20 on it is 1. With
/// t = n + f, e = 2^n (2^f - 1) + (2^n - 1), which keeps the relative accuracy at small x.
FLASH_INLINE Vector tanh_of(Vector x) {
  const Vector magnitude = abs_of(x);
  const Vector bounded = select(magnitude > splat(20), splat(20), magnitude);  // keeps a NaN
  const Exp2Argument t = split_exponent(bounded * splat(2 * kLog2E));
  const Vector power = exp2_bounded(t.n);
  const Vector e = fma(power, exp2_minus_one(t.f), power - splat(1));
  const Vector result = e / (e + splat(2));
  return from_bits(bits_of(result) | (bits_of(x) & ~(Bits(-1) >> 1)));
}

}  // namespace
}  // namespace flash::cpu
