// SPDX-License-Identifier: BSD-3-Clause
// Which kernel a problem gets, and why it gets none: no GPU needed.
#include "cuda/select.h"

#include <algorithm>

#include "check.h"
#include "cuda/tile_config.h"

namespace flash::cuda {
namespace {

constexpr DeviceLimits kA100{80, 163 * 1024}, kRtx3090{86, 99 * 1024}, kH100{90, 227 * 1024},
    kV100{70, 96 * 1024}, kNone{0, 0};

ForwardParams problem(DType dtype, int head_dim, int head_dim_v) {
  ForwardParams p{};
  p.dtype = dtype;
  p.batch = 2, p.num_heads = p.num_heads_k = 4;
  p.head_dim = head_dim, p.head_dim_v = head_dim_v;
  p.q_layout.max = p.k_layout.max = 256;
  p.softmax_scale = 0.125;
  return p;
}

void buckets_hold_both_head_dims() {
  for (int d = 1; d <= 256; ++d)
    for (int dv : {1, 64, 100, 256}) {
      const KernelSpec spec =
          select(Arch::kSm80, problem(DType::kFloat16, d, dv), Direction::kForward);
      const int wanted = std::max(d, dv);
      CHECK(spec.head_dim >= wanted);
      for (int bucket : kSm80HeadDims) CHECK(bucket >= spec.head_dim || bucket < wanted);
    }
}

void simt_takes_everything() {
  for (DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64})
    for (int d : {0, 1, 64, 65, 512, 1000})
      for (Direction direction : {Direction::kForward, Direction::kBackward}) {
        const ForwardParams p = problem(dtype, d, d);
        CHECK(why_unsupported(Arch::kSimt, p, direction, kNone).empty());
        const KernelSpec spec = select(Arch::kSimt, p, direction);
        CHECK(spec.head_dim == simt_panel(dtype, d));
        CHECK(spec.variant == (dtype == DType::kFloat32 ? Variant::kPlain : Variant::kGeneral));
      }
}

void features_choose_the_general_kernel() {
  ForwardParams p = problem(DType::kFloat32, 64, 64);
  CHECK(select(Arch::kSimt, p, Direction::kForward).variant == Variant::kPlain);
  p.features.score_mod.softcap = 30;
  CHECK(select(Arch::kSimt, p, Direction::kForward).variant == Variant::kGeneral);
  p.features.score_mod.softcap = 0;
  p.softmax_scale = 0;
  CHECK(select(Arch::kSimt, p, Direction::kForward).variant == Variant::kGeneral);
}

void reasons_name_what_is_missing() {
  const auto count = [](const ForwardParams& p, Direction direction, const DeviceLimits& device) {
    return why_unsupported(Arch::kSm80, p, direction, device).size();
  };
  const ForwardParams half = problem(DType::kFloat16, 128, 128);
  CHECK(count(half, Direction::kForward, kA100) == 0);
  CHECK(count(half, Direction::kBackward, kA100) == 0);
  CHECK(count(half, Direction::kForward, kH100) == 0);
  CHECK(count(half, Direction::kForward, kV100) == 1);
  CHECK(count(half, Direction::kForward, kNone) == 1);
  CHECK(count(half, Direction::kForward, kRtx3090) == 0);
  CHECK(count(half, Direction::kBackward, kRtx3090) == 1);  // shared memory
  CHECK(count(problem(DType::kFloat32, 64, 64), Direction::kForward, kA100) == 1);
  CHECK(count(problem(DType::kBFloat16, 64, 257), Direction::kForward, kA100) == 1);
  CHECK(count(problem(DType::kFloat64, 300, 64), Direction::kForward, kV100) == 3);
}

void hopper_falls_back_in_its_backward_alone() {
  ForwardParams p = problem(DType::kBFloat16, 96, 96);
  for (int d : {8, 64, 96, 128, 192, 256})
    CHECK(select(Arch::kSm90, problem(DType::kBFloat16, d, 64), Direction::kBackward).arch ==
          Arch::kSm90);
  p.features.score_mod.softcap = 30;
  CHECK(select(Arch::kSm90, p, Direction::kBackward).arch == Arch::kSm80);
  CHECK(select(Arch::kSm90, p, Direction::kForward).arch == Arch::kSm90);
  CHECK(select(Arch::kSm90, p, Direction::kForward).variant == Variant::kGeneral);
  CHECK(why_unsupported(Arch::kSm90, p, Direction::kForward, kH100).empty());
  CHECK(why_unsupported(Arch::kSm90, p, Direction::kBackward, kH100).empty());
  CHECK(!why_unsupported(Arch::kSm90, p, Direction::kBackward, kA100).empty());
}

}  // namespace
}  // namespace flash::cuda

int main() {
  using namespace flash::cuda;
  buckets_hold_both_head_dims();
  simt_takes_everything();
  features_choose_the_general_kernel();
  reasons_name_what_is_missing();
  hopper_falls_back_in_its_backward_alone();
}
