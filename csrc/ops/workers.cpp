// SPDX-License-Identifier: BSD-3-Clause
#include "ops/workers.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

namespace flash::ops {

TorchWorkers::TorchWorkers() : count_(at::in_parallel_region() ? 1 : at::get_num_threads()) {}

void TorchWorkers::run(void (*f)(void* context, int worker), void* context) {
  at::parallel_for(0, count_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) f(context, int(worker));
  });
}

Workspace::Workspace(int64_t bytes, at::Device device) {
  constexpr int64_t kAlignment = 256;
  if (bytes == 0) return;
  storage_ = at::empty({bytes + kAlignment - 1}, at::TensorOptions(device).dtype(at::kByte));
  const auto address = reinterpret_cast<uintptr_t>(storage_.mutable_data_ptr());
  data_ = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
}

}  // namespace flash::ops
