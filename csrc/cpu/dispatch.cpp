// SPDX-License-Identifier: BSD-3-Clause
// dtype and instruction set -> the object that has the kernels. Compiled with no instruction-set
// flag.
#include "cpu/backend.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace flash::cpu {
namespace {

/// float64 computes in double, portable only: it is there for gradcheck, not for speed.
template <class Kernels>
struct Choices {
  const Kernels& f64;
  const Kernels& portable;
#if defined(__x86_64__)
  const Kernels& avx2;
  const Kernels& avx512;
  const Kernels &avx512_bf16, &amx;  ///< of bf16
#endif

  const Kernels& of(DType dtype) const {
    if (dtype == DType::kFloat64) return f64;
#if defined(__x86_64__)
    switch (active_isa()) {
      case Isa::kAmx:
        return dtype == DType::kBFloat16 ? amx : avx512;
      case Isa::kAvx512Bf16:
        return dtype == DType::kBFloat16 ? avx512_bf16 : avx512;
      case Isa::kAvx512:
        return avx512;
      case Isa::kAvx2:
        return avx2;
      case Isa::kPortable:
        break;
    }
#endif
    return portable;
  }
};

#if defined(__x86_64__)
#define FLASH_CPU_CHOICES(kernel, avx512_bf16, amx) \
  {k##kernel##F64Portable,                          \
   k##kernel##F32Portable,                          \
   k##kernel##F32Avx2,                              \
   k##kernel##F32Avx512,                            \
   avx512_bf16,                                     \
   amx}
#else
#define FLASH_CPU_CHOICES(kernel, avx512_bf16, amx) {k##kernel##F64Portable, k##kernel##F32Portable}
#endif
constexpr Choices<ForwardKernels> kForward FLASH_CPU_CHOICES(Forward, kForwardBf16Avx512Bf16,
                                                             kForwardBf16Amx);
constexpr Choices<BackwardKernels> kBackward FLASH_CPU_CHOICES(Backward, kBackwardBf16Avx512Bf16,
                                                               kBackwardF32Avx512);
constexpr Choices<WeightsKernels> kWeights FLASH_CPU_CHOICES(Weights, kWeightsF32Avx512,
                                                             kWeightsF32Avx512);
#undef FLASH_CPU_CHOICES

std::vector<std::string> why_unsupported(const ForwardParams&, bool) { return {}; }

int64_t forward_workspace_bytes(const ForwardParams& p, int num_workers) {
  return kForward.of(p.dtype).workspace_bytes(p, num_workers);
}
void forward(const ForwardParams& p, const Launch& launch) { kForward.of(p.dtype).run(p, launch); }
int64_t backward_workspace_bytes(const BackwardParams& p, int num_workers) {
  return kBackward.of(p.dtype).workspace_bytes(p, num_workers);
}
void backward(const BackwardParams& p, const Launch& launch) {
  kBackward.of(p.dtype).run(p, launch);
}
void weights(const WeightsParams& p, const Launch& launch) { kWeights.of(p.dtype).run(p, launch); }
int64_t weights_backward_workspace_bytes(const WeightsBackwardParams& p, int num_workers) {
  return kWeights.of(p.dtype).backward_workspace_bytes(p, num_workers);
}
void weights_backward(const WeightsBackwardParams& p, const Launch& launch) {
  kWeights.of(p.dtype).backward(p, launch);
}

}  // namespace

const Backend& backend() {
  static constexpr Backend kBackend{"cpu",
                                    why_unsupported,
                                    forward_workspace_bytes,
                                    forward,
                                    backward_workspace_bytes,
                                    backward,
                                    weights,
                                    weights_backward_workspace_bytes,
                                    weights_backward};
  return kBackend;
}

}  // namespace flash::cpu
