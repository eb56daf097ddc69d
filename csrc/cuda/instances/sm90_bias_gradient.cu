// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm90/backward_launch.cuh"
#include "cuda/sm90/bias_gradient.cuh"

namespace flash::cuda::sm90 {
namespace {

/// CTAs that share the walk of a tile: a cluster, of at most 8, where tiles would leave SMs idle.
int ctas_of_tile(const BackwardParams& p, int64_t tiles) {
  const int walked =
      std::max(p.bias_shape[0] == 1 ? p.batch : 1, p.bias_shape[1] == 1 ? p.num_heads : 1);
  int ctas = 1;
  while (ctas < 8 && tiles * ctas * 2 <= num_multiprocessors() && ctas * 2 <= walked) ctas *= 2;
  return ctas;
}

template <class Traits>
void launch_traits(const BackwardParams& p, const BiasRows& rows, void* stream) {
  const int64_t tiles = Traits::Tile::count(p);
  if (tiles > std::numeric_limits<int>::max())
    throw std::runtime_error("flash_attn: the bias has more than 2^31 tiles");
  const int split = ctas_of_tile(p, tiles);
  const int64_t ctas = split > 1 ? tiles * split : std::min<int64_t>(tiles, num_multiprocessors());
  constexpr size_t kSharedBytes = sizeof(typename Traits::SharedStorage);
  prepare_launch(bias_gradient_kernel<Traits>, ctas, kSharedBytes);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(split), 1, 1};
  const cudaLaunchConfig_t config{.gridDim = dim3(unsigned(ctas)),
                                  .blockDim = dim3(unsigned(Traits::kThreads)),
                                  .dynamicSmemBytes = kSharedBytes,
                                  .stream = static_cast<cudaStream_t>(stream),
                                  .attrs = &cluster,
                                  .numAttrs = 1};
  FLASH_CUDA_CHECK(cudaLaunchKernelEx(&config, bias_gradient_kernel<Traits>,
                                      make_backward_maps<Traits>(p), p, rows, int(tiles)));
}

}  // namespace

template <int kHeadDim>
void launch_bias_gradient(const BackwardParams& p, const void* workspace, void* stream) {
  const BackwardPlan plan = make_backward_plan(p);
  const auto at = [&](int64_t bytes) {
    return reinterpret_cast<const float*>(static_cast<const char*>(workspace) + bytes);
  };
  const BiasRows rows{at(0), at(plan.delta_at), plan.rows};
  if (p.dtype == DType::kBFloat16) {
    launch_traits<BiasTraits<__nv_bfloat16, kHeadDim>>(p, rows, stream);
  } else {
    launch_traits<BiasTraits<__half, kHeadDim>>(p, rows, stream);
  }
}

template void launch_bias_gradient<64>(const BackwardParams&, const void*, void*);
template void launch_bias_gradient<128>(const BackwardParams&, const void*, void*);
template void launch_bias_gradient<192>(const BackwardParams&, const void*, void*);
template void launch_bias_gradient<256>(const BackwardParams&, const void*, void*);

}  // namespace flash::cuda::sm90
