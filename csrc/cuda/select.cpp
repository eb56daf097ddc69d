// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/select.h"

#include <algorithm>

#include "cuda/sm80/shared_bytes.h"
#include "cuda/sm90/support.h"
#include "cuda/tile_config.h"

namespace flash::cuda {
namespace {

int sm80_head_dim(const ForwardParams& p) {
  const int wanted = std::max(p.head_dim, p.head_dim_v);
  for (int bucket : kSm80HeadDims)
    if (wanted <= bucket) return bucket;
  return 0;
}

std::string spell(int compute_capability) {
  return std::to_string(compute_capability / 10) + "." + std::to_string(compute_capability % 10);
}

std::vector<std::string> why_not_sm80(const ForwardParams& p, Direction direction,
                                      const DeviceLimits& device) {
  std::vector<std::string> reasons;
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16)
    reasons.push_back("the dtype is neither float16 nor bfloat16");
  const int head_dim = sm80_head_dim(p);
  if (head_dim == 0)
    reasons.push_back("a head dim is larger than 256: " + std::to_string(p.head_dim) + ", " +
                      std::to_string(p.head_dim_v));
  if (device.compute_capability < 80) {
    reasons.push_back("the GPU has compute capability " + spell(device.compute_capability) +
                      ", not 8.0 or newer");
  } else if (head_dim != 0) {
    const int64_t needed = direction == Direction::kForward
                               ? sm80::forward_shared_bytes(head_dim, p.variant())
                               : sm80::backward_shared_bytes(head_dim, p.variant());
    if (needed > device.shared_bytes)
      reasons.push_back("head dim " + std::to_string(head_dim) + " needs " +
                        std::to_string(needed) + " bytes of shared memory, the GPU has " +
                        std::to_string(device.shared_bytes));
  }
  return reasons;
}

}  // namespace

KernelSpec select(Arch arch, const ForwardParams& p, Direction direction) {
  switch (arch) {
    case Arch::kSm90:
      if (direction == Direction::kForward)
        return {arch, p.dtype, sm90::forward_head_dim(p), p.variant()};
      // sm80's kernels differentiate what sm90's backward does not take.
      if (sm90::why_backward_unsupported(p).empty())
        return {arch, p.dtype, sm90::backward_head_dim(p), p.variant()};
      return select(Arch::kSm80, p, direction);
    case Arch::kSm80:
      return {arch, p.dtype, sm80_head_dim(p), p.variant()};
    case Arch::kSimt:
      break;
  }
  const int width =
      direction == Direction::kForward ? p.head_dim_v : std::max(p.head_dim, p.head_dim_v);
  // Only fp32 has kernels without features: the other dtypes rarely come here.
  const Variant variant = p.dtype == DType::kFloat32 ? p.variant() : Variant::kGeneral;
  return {arch, p.dtype, simt_panel(p.dtype, width), variant};
}

std::vector<std::string> why_unsupported(Arch arch, const ForwardParams& p, Direction direction,
                                         const DeviceLimits& device) {
  if (arch == Arch::kSimt) return {};
  if (arch == Arch::kSm80) return why_not_sm80(p, direction, device);
  std::vector<std::string> reasons = direction == Direction::kForward
                                         ? sm90::why_forward_unsupported(p)
                                         : why_not_sm80(p, direction, device);
  if (device.compute_capability != 90)
    reasons.push_back("the GPU has compute capability " + spell(device.compute_capability) +
                      ", not 9.0");
  return reasons;
}

}  // namespace flash::cuda
