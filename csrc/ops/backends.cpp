// SPDX-License-Identifier: BSD-3-Clause
#include "ops/backends.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <mutex>

#include "cpu/backend.h"
#include "ops/checks.h"

namespace flash::ops {

namespace {

std::mutex name_mutex;
std::string process_name;
thread_local const std::string* scope_name = nullptr;

std::string names_of(const std::vector<const Backend*>& backends) {
  std::vector<std::string> names;
  for (const Backend* backend : backends) names.emplace_back(backend->name);
  return c10::Join(", ", names);
}

/// 16-bit inputs have tensor-core kernels; where none can, the generic ones are many times slower.
void announce_slow_path(const Backend& chosen, const ForwardParams& p,
                        const std::vector<std::string>& reasons) {
  if (element_bytes(p.dtype) != 2 || std::string(chosen.name) != "simt") return;
  TORCH_WARN_ONCE("flash_attn: this call runs on the generic backend 'simt', which is slower: ",
                  c10::Join("; ", reasons));
}

}  // namespace

const std::vector<const Backend*>& cpu_backends() {
  static const std::vector<const Backend*> backends{&cpu::backend()};
  return backends;
}

std::vector<std::string> backend_names() {
  std::vector<std::string> names;
  for (const auto* backends : {&cpu_backends(), &cuda_backends()})
    for (const Backend* backend : *backends) names.emplace_back(backend->name);
  return names;
}

void set_named_backend(const std::string& name) {
  const std::vector<std::string> known = backend_names();
  if (!name.empty() && std::find(known.begin(), known.end(), name) == known.end())
    refuse_backend_name(name, c10::Join(", ", known));
  const std::lock_guard<std::mutex> lock(name_mutex);
  process_name = name;
}

std::string named_backend() {
  if (scope_name) return *scope_name;
  const std::lock_guard<std::mutex> lock(name_mutex);
  return process_name;
}

BackendScope::BackendScope(const std::string& name) : outer_(scope_name) { scope_name = &name; }
BackendScope::~BackendScope() { scope_name = outer_; }

const Backend& choose_backend(const Device& device, const ForwardParams& p, bool backward) {
  const std::string name = named_backend();
  std::vector<std::string> reasons;
  for (const Backend* candidate : device.candidates) {
    if (!name.empty() && name != candidate->name) continue;
    const std::vector<std::string> why = candidate->why_unsupported(p, backward);
    if (why.empty()) {
      if (name.empty()) announce_slow_path(*candidate, p, reasons);
      return *candidate;
    }
    if (!name.empty()) refuse_backend(name, why);
    for (const std::string& reason : why) reasons.push_back(candidate->name + (": " + reason));
  }
  if (!name.empty()) refuse_device(name, device.type, names_of(device.candidates));
  refuse_all_backends(reasons);
}

std::vector<std::string> why_unsupported(const std::vector<const Backend*>& candidates,
                                         const std::string& name, const ForwardParams& p,
                                         bool backward) {
  std::vector<std::string> reasons;
  bool found = false;
  for (const Backend* candidate : candidates) {
    if (!name.empty() && name != candidate->name) continue;
    found = true;
    const std::vector<std::string> why = candidate->why_unsupported(p, backward);
    if (why.empty()) return {};
    for (const std::string& reason : why) reasons.push_back(candidate->name + (": " + reason));
  }
  if (!found)
    reasons.push_back("no backend '" + name + "' for this device; it has " +
                      (candidates.empty() ? "none" : names_of(candidates)));
  return reasons;
}

}  // namespace flash::ops
