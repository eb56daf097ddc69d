// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "attention/backend.h"

namespace flash::cuda {

/// The compiled CUDA backends, best first: sm90, sm80, simt. Each answers why_unsupported for the
/// current device.
const std::vector<const Backend*>& backends();

/// Writes (seed, offset) where `unpack` needs a kernel: used by the rng_state op under graph
/// capture. seed_or_ptr and offset_or_ptr are values, or device pointers when captured;
/// offset_extra is added.
void store_rng_state(int64_t* rng_state, uint64_t seed, uint64_t offset, const int64_t* seed_ptr,
                     const int64_t* offset_ptr, uint64_t offset_extra, void* stream);

}  // namespace flash::cuda
