// SPDX-License-Identifier: BSD-3-Clause
// Compiled with no instruction-set flag: it runs on every machine.
#include "cpu/isa.h"

#include <atomic>
#include <stdexcept>

#include "cpu/backend.h"

namespace flash::cpu {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx512;
  }
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

std::atomic<Isa>& chosen_isa() {
  static std::atomic<Isa> isa{detected_isa()};
  return isa;
}

}  // namespace

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa() { return chosen_isa().load(std::memory_order_relaxed); }

std::vector<std::string> available_isas() { return {kNames, kNames + int(detected_isa()) + 1}; }

const char* current_isa() { return kNames[int(active_isa())]; }

void set_isa(const std::string& name) {
  if (name.empty()) {
    chosen_isa() = detected_isa();
    return;
  }
  std::string available;
  for (int i = 0; i <= int(detected_isa()); ++i) {
    if (name == kNames[i]) {
      chosen_isa() = Isa(i);
      return;
    }
    available += std::string(i ? ", " : "") + kNames[i];
  }
  throw std::invalid_argument("flash_attn: expected a CPU instruction set out of " + available +
                              ", got '" + name + "'");
}

}  // namespace flash::cpu
