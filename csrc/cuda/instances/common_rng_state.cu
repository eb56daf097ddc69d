// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/common/rng_state.cuh"

namespace flash::cuda {

void store_rng_state(int64_t* rng_state, uint64_t seed, uint64_t offset, const int64_t* seed_ptr,
                     const int64_t* offset_ptr, uint64_t offset_extra, void* stream) {
  launch(store_rng_state_kernel, 1, 1, 0, stream, rng_state, seed, offset, seed_ptr, offset_ptr,
         offset_extra);
}

}  // namespace flash::cuda
