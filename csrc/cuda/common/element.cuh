// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "attention/params.h"
#include "primitives/numeric.cuh"

namespace flash::cuda {

template <DType kDType>
struct ElementOf;
template <>
struct ElementOf<DType::kFloat16> {
  using type = __half;
};
template <>
struct ElementOf<DType::kBFloat16> {
  using type = __nv_bfloat16;
};
template <>
struct ElementOf<DType::kFloat32> {
  using type = float;
};
template <>
struct ElementOf<DType::kFloat64> {
  using type = double;
};
/// The C++ type of a dtype on the device.
template <DType kDType>
using Element = typename ElementOf<kDType>::type;

/// widen() as a value, which the hooks of score_mod.h take.
struct Widen {
  template <class T>
  __device__ __forceinline__ auto operator()(T x) const {
    return widen(x);
  }
};

}  // namespace flash::cuda
