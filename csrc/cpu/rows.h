// SPDX-License-Identifier: BSD-3-Clause
// Rows of any dtype, and of any stride, as Reals.
#pragma once

#include "cpu/element.h"

namespace flash::cpu {
namespace {

/// to[i] = data[at + i step], widened.
FLASH_NOINLINE void read_row(DType dtype, const void* data, int64_t at, int64_t step, int count,
                             Real* to) {
  auto read = [&]<class Element>(const Element* from) {
    from += at;
    if constexpr (!(sizeof(Real) == 8 && sizeof(Element) == 4)) {
      if (step == 1) return widen_row(from, count, to);
    }
    for (int i = 0; i < count; ++i) {
      if constexpr (sizeof(Real) == 8) {
        to[i] = Real(from[i * step]);
      } else {
        to[i] = widen(from[i * step]);
      }
    }
  };
  if (sizeof(Real) == 8 && dtype == DType::kFloat32) return read(static_cast<const float*>(data));
  with_element(dtype, [&]<class Element> { read(static_cast<const Element*>(data)); });
}
/// data[at + i] = from[i], rounded.
FLASH_NOINLINE void write_row(DType dtype, void* data, int64_t at, int count, const Real* from) {
  if (sizeof(Real) == 8 && dtype == DType::kFloat32) {
    float* to = static_cast<float*>(data) + at;
    for (int i = 0; i < count; ++i) to[i] = float(from[i]);
    return;
  }
  with_element(dtype, [&]<class Element> {
    Element* to = static_cast<Element*>(data) + at;
    for (int i = 0; i < count; ++i) to[i] = narrow<Element>(from[i]);
  });
}

}  // namespace
}  // namespace flash::cpu
