// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm90/backward_launch.cuh"
#include "cuda/sm90/bias_gradient.cuh"

namespace flash::cuda::sm90 {
namespace {

template <class Traits>
void launch_traits(const BackwardParams& p, const RowView& delta, void* stream) {
  const int64_t tiles = Traits::Tile::count(p);
  if (tiles > std::numeric_limits<int>::max())
    throw std::runtime_error("flash_attn: the bias has more than 2^31 tiles");
  launch(bias_gradient_kernel<Traits>, std::min<int64_t>(tiles, num_multiprocessors()),
         Traits::kThreads, sizeof(typename Traits::SharedStorage), stream,
         make_backward_maps<Traits>(p), p, delta, int(tiles));
}

}  // namespace

template <int kHeadDim>
void launch_bias_gradient(const BackwardParams& p, const RowView& delta, void* stream) {
  if (p.dtype == DType::kBFloat16) {
    launch_traits<BiasTraits<__nv_bfloat16, kHeadDim>>(p, delta, stream);
  } else {
    launch_traits<BiasTraits<__half, kHeadDim>>(p, delta, stream);
  }
}

template void launch_bias_gradient<64>(const BackwardParams&, const RowView&, void*);
template void launch_bias_gradient<128>(const BackwardParams&, const RowView&, void*);

}  // namespace flash::cuda::sm90
