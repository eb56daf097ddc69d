// SPDX-License-Identifier: BSD-3-Clause
//
// How numbers lie in tensors, and how they become Reals: widened exactly on load, rounded once, to
// nearest even, on store.
#pragma once

#include "attention/params.h"
#include "cpu/vector.h"

namespace flash::cpu {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FLASH_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
FLASH_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

FLASH_INLINE Real widen(Real x) { return x; }
FLASH_INLINE float widen(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }
FLASH_INLINE float widen(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // The magnitude, moved to where float keeps it, is 2^-112 of the number: normals and subnormals
  // alike, for the multiplication is exact. Infinities and NaNs have the largest exponent.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
  const uint32_t result = magnitude >= 0x7c00u << 13 ? magnitude | 0x7f800000u : scaled;
  return float_of(result | uint32_t(x.bits & 0x8000) << 16);
#endif
}

template <class Element>
struct Narrow;
template <>
struct Narrow<Real> {
  static FLASH_HOST_DEVICE Real of(Real x) { return x; }
};
template <>
struct Narrow<BFloat16> {
  static FLASH_HOST_DEVICE BFloat16 of(float x) {
    const uint32_t bits = bits_of(x);
    if (x != x) return {uint16_t(bits >> 16 | 0x40)};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
};
template <>
struct Narrow<Float16> {
  static FLASH_HOST_DEVICE Float16 of(float x) {
#if defined(__F16C__)
    return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
    const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to 65536 or more
    if (magnitude <
        0x38800000) {  // below 2^-14: units of 2^-24, rounded by adding 2^-1 2^23 of them
      const uint32_t units = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
      return {uint16_t(sign | units)};
    }
    const uint32_t rebiased = magnitude - (112u << 23);
    return {uint16_t(sign | (rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13)};
#endif
  }
};
template <class Element>
FLASH_INLINE Element narrow(Real x) {
  return Narrow<Element>::of(x);
}

/// to[i] = from[i] for a row of `count` numbers.
FLASH_INLINE void widen_row(const Real* from, int count, Real* to) {
  for (int i = 0; i < count; ++i) to[i] = from[i];
}
FLASH_INLINE void widen_row(const BFloat16* from, int count, float* to) {
  for (int i = 0; i < count; ++i) to[i] = widen(from[i]);
}
FLASH_INLINE void widen_row(const Float16* from, int count, float* to) {
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
#endif
  for (; i < count; ++i) to[i] = widen(from[i]);
}

/// Calls f.operator()<Element>() with the type of a dtype that this unit's Real accumulates.
template <class F>
FLASH_INLINE void with_element(DType dtype, F&& f) {
  if constexpr (sizeof(Real) == 8) {
    f.template operator()<double>();
  } else {
    switch (dtype) {
      case DType::kBFloat16:
        return f.template operator()<BFloat16>();
      case DType::kFloat16:
        return f.template operator()<Float16>();
      default:
        return f.template operator()<float>();
    }
  }
}

}  // namespace
}  // namespace flash::cpu
