// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "attention/platform.h"

namespace flash::cuda::sm90 {

struct Division {
  int quotient, remainder;
};

/// Division by a number that the host knows. One thread says what a CTA does next, and the tiles of
/// short sequences wait for it: four divisions of 35 instructions each were 2 % of their time.
///
/// With 2^(s - 1) < d <= 2^s and m = floor(2^32 (2^s - d) / d) + 1,
///   floor(n / d) = floor((floor(m n / 2^32) + n) / 2^s)   for 0 <= n < 2^31
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int d) : d_(uint32_t(d)) {
    while ((uint64_t{1} << shift_) < d_) ++shift_;
    multiplier_ = uint32_t(((((uint64_t{1} << shift_) - d_) << 32) / d_) + 1);
  }
  FLASH_HOST_DEVICE int value() const { return int(d_); }
  FLASH_HOST_DEVICE int quotient(int n) const {
    const auto high = uint32_t((uint64_t{multiplier_} * uint32_t(n)) >> 32);
    return int((high + uint32_t(n)) >> shift_);
  }
  FLASH_HOST_DEVICE int remainder(int n) const { return n - quotient(n) * int(d_); }
  FLASH_HOST_DEVICE Division divide(int n) const {
    const int q = quotient(n);
    return {q, n - q * int(d_)};
  }

 private:
  uint32_t d_ = 1, multiplier_ = 1, shift_ = 0;
};

}  // namespace flash::cuda::sm90
