// SPDX-License-Identifier: BSD-3-Clause
// Which backend takes a call.
#pragma once

#include <c10/core/DeviceType.h>

#include <string>
#include <vector>

#include "attention/backend.h"

namespace flash::ops {

/// What a dispatch key brings: the backends of its device, best first, and what they run on.
struct Device {
  c10::DeviceType type;
  const std::vector<const Backend*>& candidates;
  void* stream = nullptr;
  Workers* workers = nullptr;

  /// CUDA backends write the rows of out, lse, dq, dk and dv that no sequence owns, and all of
  /// dbias; for the others they are filled beforehand.
  bool fills_unowned_rows() const { return type == at::kCUDA; }
  int num_workers() const { return workers ? workers->count() : 1; }
};

const std::vector<const Backend*>& cpu_backends();
/// Empty in a build without CUDA (cuda_absent.cpp).
const std::vector<const Backend*>& cuda_backends();
std::vector<std::string> backend_names();

/// The backend that calls must take; "" chooses the first that can. Process-wide.
void set_named_backend(const std::string& name);
/// Read at each call; inside a BackendScope that scope's.
std::string named_backend();

/// Makes this thread's calls take the backend that was named when the forward ran.
class BackendScope {
 public:
  explicit BackendScope(const std::string& name);
  ~BackendScope();
  BackendScope(const BackendScope&) = delete;
  BackendScope& operator=(const BackendScope&) = delete;

 private:
  const std::string* outer_;
};

/// The named backend, or the first candidate that can. Throws with every reason if none can.
const Backend& choose_backend(const Device& device, const ForwardParams& p, bool backward);
/// Why the named backend, or, with "", every backend, cannot take the call. Empty: one can.
std::vector<std::string> why_unsupported(const std::vector<const Backend*>& candidates,
                                         const std::string& name, const ForwardParams& p,
                                         bool backward);

}  // namespace flash::ops
