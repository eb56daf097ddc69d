// SPDX-License-Identifier: BSD-3-Clause
// What ops lends a backend: torch's threads and torch's memory.
#pragma once

#include <ATen/core/Tensor.h>

#include "attention/backend.h"

namespace flash::ops {

/// torch's intra-op pool, as large as torch.set_num_threads says; one worker inside of it.
class TorchWorkers final : public Workers {
 public:
  TorchWorkers();
  int count() const override { return count_; }
  void run(void (*f)(void* context, int worker), void* context) override;

 private:
  int count_;
};

/// Uninitialised memory of torch's allocator for `device`, aligned to 256 bytes.
class Workspace {
 public:
  Workspace(int64_t bytes, at::Device device);
  void* data() const { return data_; }

 private:
  at::Tensor storage_;
  void* data_ = nullptr;
};

}  // namespace flash::ops
