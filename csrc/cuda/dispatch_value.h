// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <sstream>
#include <stdexcept>

namespace flash::cuda {

/// Calls f.operator()<c>() for the listed constant c that equals `value`; throws with the list of
/// choices otherwise.
///   dispatch_value<64, 128>("head_dim", bucket, [&]<int kHeadDim> { launch<kHeadDim>(params); });
template <auto... kChoices, class T, class F>
void dispatch_value(const char* what, T value, F&& f) {
  const bool found =
      ((value == static_cast<T>(kChoices) && (f.template operator()<kChoices>(), true)) || ...);
  if (found) return;
  std::ostringstream message;
  message << "flash_attn: no CUDA kernel for " << what << " " << static_cast<long>(value)
          << "; compiled for:";
  ((message << ' ' << static_cast<long>(kChoices)), ...);
  throw std::runtime_error(message.str());
}

}  // namespace flash::cuda
