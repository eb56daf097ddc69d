// SPDX-License-Identifier: BSD-3-Clause
// The state of torch's generator as the kernels read it, (seed, offset) in device memory. Under
// graph capture seed and offset are known to the device alone.
#pragma once

#include "cuda/backend.h"
#include "cuda/launch.cuh"

namespace flash::cuda {

__global__ void store_rng_state_kernel(int64_t* rng_state, uint64_t seed, uint64_t offset,
                                       const int64_t* seed_ptr, const int64_t* offset_ptr,
                                       uint64_t offset_extra) {
  rng_state[0] = seed_ptr ? *seed_ptr : int64_t(seed);
  rng_state[1] = int64_t((offset_ptr ? uint64_t(*offset_ptr) : offset) + offset_extra);
}

}  // namespace flash::cuda
