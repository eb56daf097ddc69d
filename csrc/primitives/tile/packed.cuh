// SPDX-License-Identifier: BSD-3-Clause
// Two 16-bit elements in one register: what tensor cores and 4-byte stores take.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "primitives/device.cuh"

namespace flash {

/// Two floats to a pair of 16-bit elements, rounded to nearest even.
template <class Element>
FLASH_DEVICE uint32_t pack(float low, float high);
template <>
FLASH_DEVICE uint32_t pack<__nv_bfloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
FLASH_DEVICE uint32_t pack<__half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

/// The inverse of pack: exact.
template <class Element>
FLASH_DEVICE float2 unpack(uint32_t pair);
template <>
FLASH_DEVICE float2 unpack<__nv_bfloat16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
FLASH_DEVICE float2 unpack<__half>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

/// max(x, 0) of both elements of a pair; a NaN stays.
template <class Element>
FLASH_DEVICE uint32_t positive_part(uint32_t pair);
template <>
FLASH_DEVICE uint32_t positive_part<__nv_bfloat16>(uint32_t pair) {
  asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(pair) : "r"(0u));
  return pair;
}
template <>
FLASH_DEVICE uint32_t positive_part<__half>(uint32_t pair) {
  asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(0u));
  return pair;
}

}  // namespace flash
