// SPDX-License-Identifier: BSD-3-Clause
// The contract between ops and a backend. Host only; not included by kernels.
#pragma once

#include <string>
#include <vector>

#include "attention/params.h"

namespace flash {

/// A pool of threads that a CPU backend is lent: count() workers, run(f) calls f(worker) once for
/// each of them and returns when all have. A worker's index is smaller than count().
class Workers {
 public:
  virtual ~Workers() = default;
  virtual int count() const = 0;
  virtual void run(void (*f)(void* context, int worker), void* context) = 0;
};

/// What a call runs on. Workspace comes uninitialised, 256-byte aligned, of the size that the
/// backend asked for; nothing in it outlives the call.
struct Launch {
  void* workspace = nullptr;
  void* stream = nullptr;      ///< cudaStream_t; CPU: unused
  Workers* workers = nullptr;  ///< CPU; CUDA: unused
};

/// One way to compute attention, as functions. A backend neither allocates nor synchronises.
struct Backend {
  const char* name;  ///< as `use_backend` spells it
  /// Why this backend cannot take a problem; empty: it can. The only statement of support.
  std::vector<std::string> (*why_unsupported)(const ForwardParams&, bool backward);
  int64_t (*forward_workspace_bytes)(const ForwardParams&, int num_workers);
  void (*forward)(const ForwardParams&, const Launch&);
  int64_t (*backward_workspace_bytes)(const BackwardParams&, int num_workers);
  void (*backward)(const BackwardParams&, const Launch&);
  void (*weights)(const WeightsParams&, const Launch&);
  int64_t (*weights_backward_workspace_bytes)(const WeightsBackwardParams&, int num_workers);
  void (*weights_backward)(const WeightsBackwardParams&, const Launch&);
};

}  // namespace flash
