// SPDX-License-Identifier: BSD-3-Clause
// Conversions between the element types in memory and the types that sums are kept in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "primitives/device.cuh"
#include "primitives/tile/packed.cuh"

namespace flash {

/// Type of sums: double for double, else float.
template <class Element>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class Element>
using Accumulator = typename AccumulatorOf<Element>::type;

FLASH_DEVICE float widen(float x) { return x; }
FLASH_DEVICE double widen(double x) { return x; }
FLASH_DEVICE float widen(__half x) { return __half2float(x); }
FLASH_DEVICE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

/// Rounds to nearest even.
template <class Element, class Real>
FLASH_DEVICE Element narrow(Real x) {
  if constexpr (sizeof(Element) == sizeof(Real)) {
    return x;
  } else {
    return Element(x);
  }
}

/// 2^x to 2 ulp; subnormal results are 0.
FLASH_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// The smaller of two; NaN if one is (fminf would drop it).
FLASH_DEVICE float min_or_nan(float a, float b) {
  float smaller;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(smaller) : "f"(a), "f"(b));
  return smaller;
}

/// e^x. In float by exp2, whose argument the multiplication rounds once: the relative error is at
/// most (|x| + 4) 2^-24, of the order of what the rounding of x itself costs.
FLASH_DEVICE float exp_of(float x) { return exp2_approx(x * 1.4426950408889634f); }
FLASH_DEVICE double exp_of(double x) { return exp(x); }
FLASH_DEVICE float log_of(float x) { return logf(x); }
FLASH_DEVICE double log_of(double x) { return log(x); }

/// kCount consecutive elements, moved as one.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) AlignedArray {
  T x[kCount];
};

/// Whether rows of this pointer and stride can be read kCount elements at a time.
template <int kCount, class Element>
FLASH_DEVICE bool rows_are_aligned(const Element* data, int64_t row_stride) {
  return reinterpret_cast<uintptr_t>(data) % (sizeof(Element) * kCount) == 0 &&
         row_stride % kCount == 0;
}

}  // namespace flash
