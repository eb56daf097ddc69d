// SPDX-License-Identifier: BSD-3-Clause
// The CUDA backends, and the only place where run-time values become template arguments. No device
// code.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "cuda/backend.h"
#include "cuda/device.h"
#include "cuda/dispatch_value.h"
#include "cuda/kernels.h"
#include "cuda/select.h"
#include "cuda/sm90/support.h"
#include "cuda/tile_config.h"

namespace flash::cuda {
namespace {

/// The current device; asked once per device. Zeros without one: every backend but simt then says
/// what it wants.
DeviceLimits current_device() {
  constexpr int kMaxDevices = 64;
  static std::atomic<uint64_t> known[kMaxDevices];  // capability << 32 | shared bytes
  int device = 0, major = 0, minor = 0, shared_bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return {};
  uint64_t packed = known[device].load(std::memory_order_relaxed);
  if (packed == 0) {
    const auto ask = [&](int* value, cudaDeviceAttr attribute) {
      return cudaDeviceGetAttribute(value, attribute, device) == cudaSuccess;
    };
    if (!ask(&major, cudaDevAttrComputeCapabilityMajor) ||
        !ask(&minor, cudaDevAttrComputeCapabilityMinor) ||
        !ask(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin))
      return {};
    packed = uint64_t(10 * major + minor) << 32 | uint64_t(shared_bytes);
    known[device].store(packed, std::memory_order_relaxed);
  }
  return {int(packed >> 32), int64_t(packed & 0xffffffffu)};
}

template <class F>
void dispatch_dtype(DType dtype, F&& f) {
  dispatch_value<DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64>("dtype",
                                                                                      dtype, f);
}

/// f.operator()<kDType, kHeadDim, kVariant>() for the sm80 kernel of `spec`.
template <class F>
void dispatch_sm80(const KernelSpec& spec, F&& f) {
  dispatch_value<DType::kFloat16, DType::kBFloat16>("dtype", spec.dtype, [&]<DType kDType> {
    dispatch_value<64, 96, 128, 192, 256>("head_dim", spec.head_dim, [&]<int kHeadDim> {
      dispatch_value<Variant::kPlain, Variant::kGeneral>(
          "variant", spec.variant,
          [&]<Variant kVariant> { f.template operator()<kDType, kHeadDim, kVariant>(); });
    });
  });
}

/// The same for simt: fp32 has two panels and both variants, the other dtypes one of each.
template <class F>
void dispatch_simt(const KernelSpec& spec, F&& f) {
  dispatch_dtype(spec.dtype, [&]<DType kDType> {
    if constexpr (kDType == DType::kFloat32) {
      dispatch_value<64, 128>("panel", spec.head_dim, [&]<int kPanel> {
        dispatch_value<Variant::kPlain, Variant::kGeneral>(
            "variant", spec.variant,
            [&]<Variant kVariant> { f.template operator()<kDType, kPanel, kVariant>(); });
      });
    } else {
      f.template operator()<kDType, simt_panel(kDType, 0), Variant::kGeneral>();
    }
  });
}

template <DType kDType>
void fill_gradient(const TensorView& view, const SequenceLayout& layout, int num_heads, int batch,
                   int width, void* stream) {
  if (view.data && layout.ragged())
    launch_fill_rows<kDType>(view, RowView{}, layout, num_heads, batch, width, Fill::kUnowned,
                             stream);
}

/// The sm90 kernel that writes dbias does not visit blocks that a mask drops whole.
void clear_bias_gradient(const BackwardParams& p, void* stream) {
  const int (&shape)[4] = p.bias_shape;
  const int bytes = p.features.score_mod.bias_is_float32 ? 4 : element_bytes(p.dtype);
  FLASH_CUDA_CHECK(cudaMemsetAsync(p.dbias, 0,
                                   size_t(shape[0]) * shape[1] * shape[2] * shape[3] * bytes,
                                   static_cast<cudaStream_t>(stream)));
}

/// Where the parts of a backward's workspace lie, in bytes from its start.
struct BackwardWorkspace {
  int64_t delta, partials, scratch, bytes;

  static BackwardWorkspace of(const BackwardParams& p, int64_t scratch_bytes) {
    const auto align = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
    const SequenceLayout& q = p.q_layout;
    const int64_t rows = (q.packed() ? q.total : int64_t(p.batch) * q.max) * int64_t(p.num_heads);
    const int64_t blocks = (q.max + simt_rows(p.dtype) - 1) / simt_rows(p.dtype);
    const int64_t slopes = p.dslopes ? int64_t(p.batch) * p.num_heads * blocks : 0;
    const int64_t real = accumulation_bytes(p.dtype);
    BackwardWorkspace parts{};
    parts.partials = parts.delta + align(rows * real);
    parts.scratch = parts.partials + align(slopes * real);
    parts.bytes = parts.scratch + align(scratch_bytes);
    return parts;
  }
  RowView delta_view(const BackwardParams& p, void* workspace) const {
    const SequenceLayout& q = p.q_layout;
    RowView view;
    view.data = static_cast<char*>(workspace) + delta;
    view.head_stride = q.packed() ? q.total : q.max;
    view.batch_stride = q.packed() ? 0 : int64_t(p.num_heads) * q.max;
    return view;
  }
};

/// sm80's kernels take gradients whose rows sm90's could not.
KernelSpec select_backward(Arch arch, const BackwardParams& p) {
  if (arch == Arch::kSm90 && !sm90::gradients_are_aligned(p)) arch = Arch::kSm80;
  return select(arch, p, Direction::kBackward);
}

int64_t scratch_bytes(Arch arch, const BackwardParams& p) {
  switch (select_backward(arch, p).arch) {
    case Arch::kSm90:
      return sm90::backward_workspace_bytes(p);
    case Arch::kSm80:
      return sm80::backward_scratch_bytes(p);
    case Arch::kSimt:
      break;
  }
  return 0;
}

template <Arch kArch>
std::vector<std::string> why_unsupported(const ForwardParams& p, bool backward) {
  return why_unsupported(kArch, p, backward ? Direction::kBackward : Direction::kForward,
                         current_device());
}

template <Arch kArch>
int64_t forward_workspace_bytes(const ForwardParams& p, int) {
  return kArch == Arch::kSm90 ? sm90::forward_workspace_bytes(p) : 0;
}

template <Arch kArch>
void forward(const ForwardParams& p, const Launch& launch) {
  if (p.q_layout.ragged())
    dispatch_dtype(p.dtype, [&]<DType kDType> {
      launch_fill_rows<kDType>(p.out, p.lse, p.q_layout, p.num_heads, p.batch, p.head_dim_v,
                               Fill::kUnowned, launch.stream);
    });
  const KernelSpec spec = select(kArch, p, Direction::kForward);
  if constexpr (kArch == Arch::kSimt) {
    dispatch_simt(spec, [&]<DType kDType, int kPanel, Variant kVariant> {
      simt::launch_forward<kDType, kPanel, kVariant>(p, launch.stream);
    });
  } else if constexpr (kArch == Arch::kSm80) {
    dispatch_sm80(spec, [&]<DType kDType, int kHeadDim, Variant kVariant> {
      sm80::launch_forward<kDType, kHeadDim, kVariant>(p, launch.stream);
    });
  } else {
    dispatch_value<64, 96, 128, 192, 256>("head_dim", spec.head_dim, [&]<int kHeadDim> {
      dispatch_value<Variant::kPlain, Variant::kGeneral>(
          "variant", spec.variant, [&]<Variant kVariant> {
            sm90::launch_forward<kHeadDim, kVariant>(p, launch.workspace, launch.stream);
          });
    });
  }
}

template <Arch kArch>
int64_t backward_workspace_bytes(const BackwardParams& p, int) {
  return BackwardWorkspace::of(p, scratch_bytes(kArch, p)).bytes;
}

void backward_sm90(const KernelSpec& spec, const BackwardParams& p, void* workspace, void* stream) {
  dispatch_value<64, 96, 128, 192, 256>("head_dim", spec.head_dim, [&]<int kHeadDim> {
    dispatch_value<Variant::kPlain, Variant::kGeneral>(
        "variant", spec.variant,
        [&]<Variant kVariant> { sm90::launch_backward<kHeadDim, kVariant>(p, workspace, stream); });
    if (sm90::sums_bias_gradient(p))
      sm90::launch_bias_gradient<kHeadDim == 96 ? 128 : kHeadDim>(p, workspace, stream);
  });
}

/// dq, dk, dv from a complete delta.
void backward_with_delta(const KernelSpec& spec, const BackwardParams& p, const RowView& delta,
                         void* scratch, void* stream) {
  if (!p.dq.data && !p.dk.data && !p.dv.data) return;
  if (spec.arch == Arch::kSimt) {
    dispatch_simt(spec, [&]<DType kDType, int kPanel, Variant kVariant> {
      simt::launch_backward<kDType, kPanel, kVariant>(p, delta, stream);
    });
  } else {
    dispatch_sm80(spec, [&]<DType kDType, int kHeadDim, Variant kVariant> {
      sm80::launch_backward<kDType, kHeadDim, kVariant>(p, delta, scratch, stream);
    });
  }
}

/// delta; then dq, dk, dv by the architecture's kernels; then the gradients of the features.
template <Arch kArch>
void backward(const BackwardParams& p, const Launch& launch) {
  const KernelSpec spec = select_backward(kArch, p);
  const auto parts = BackwardWorkspace::of(p, scratch_bytes(kArch, p));
  char* const workspace = static_cast<char*>(launch.workspace);
  void* const stream = launch.stream;
  const RowView delta = parts.delta_view(p, workspace);
  dispatch_dtype(p.dtype, [&]<DType kDType> {
    fill_gradient<kDType>(p.dq, p.q_layout, p.num_heads, p.batch, p.head_dim, stream);
    fill_gradient<kDType>(p.dk, p.k_layout, p.num_heads_k, p.batch, p.head_dim, stream);
    fill_gradient<kDType>(p.dv, p.k_layout, p.num_heads_k, p.batch, p.head_dim_v, stream);
    const bool is_sm90 = spec.arch == Arch::kSm90;
    if (p.dbias && !(is_sm90 && sm90::fills_bias_gradient(p))) clear_bias_gradient(p, stream);
    const bool with_dbias =
        is_sm90 && (sm90::writes_bias_gradient(p) || sm90::sums_bias_gradient(p));
    if (is_sm90 && (p.dq.data || p.dk.data || p.dv.data || with_dbias))
      backward_sm90(spec, p, workspace + parts.scratch, stream);
    const bool wants_dbias = p.dbias && !with_dbias;
    // sm90's kernels have a delta of their own.
    if (is_sm90 && !wants_dbias && !p.dslopes && !p.dsink) return;
    launch_backward_delta<kDType>(p, delta, stream);
    if (!is_sm90) backward_with_delta(spec, p, delta, workspace + parts.scratch, stream);
    if (wants_dbias) launch_backward_bias<kDType>(p, delta, stream);
    if (p.dslopes) launch_backward_slopes<kDType>(p, delta, workspace + parts.partials, stream);
    if (p.dsink) launch_backward_sink<kDType>(p, delta, stream);
  });
}

void weights(const WeightsParams& p, const Launch& launch) {
  dispatch_dtype(p.dtype, [&]<DType kDType> { simt::launch_weights<kDType>(p, launch.stream); });
}
int64_t weights_backward_workspace_bytes(const WeightsBackwardParams&, int) { return 0; }
void weights_backward(const WeightsBackwardParams& p, const Launch& launch) {
  dispatch_dtype(p.dtype,
                 [&]<DType kDType> { simt::launch_weights_backward<kDType>(p, launch.stream); });
}

template <Arch kArch>
constexpr Backend make_backend(const char* name) {
  return {.name = name,
          .why_unsupported = why_unsupported<kArch>,
          .forward_workspace_bytes = forward_workspace_bytes<kArch>,
          .forward = forward<kArch>,
          .backward_workspace_bytes = backward_workspace_bytes<kArch>,
          .backward = backward<kArch>,
          .weights = weights,
          .weights_backward_workspace_bytes = weights_backward_workspace_bytes,
          .weights_backward = weights_backward};
}

constexpr Backend kSm90 = make_backend<Arch::kSm90>("sm90");
constexpr Backend kSm80 = make_backend<Arch::kSm80>("sm80");
constexpr Backend kSimt = make_backend<Arch::kSimt>("simt");

}  // namespace

const std::vector<const Backend*>& backends() {
  static const std::vector<const Backend*> all{&kSm90, &kSm80, &kSimt};
  return all;
}

}  // namespace flash::cuda
