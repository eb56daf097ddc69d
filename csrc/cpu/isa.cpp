// SPDX-License-Identifier: BSD-3-Clause
// Compiled with no instruction-set flag: it runs on every machine.
#include "cpu/isa.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/backend.h"

namespace flash::cpu {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__) && defined(__linux__)
/// Whether there are tile registers for bf16 (CPUID leaf 7), and the kernel lets this process have
/// them: it makes room for their 8 KiB in signal frames on request only.
bool has_amx() {
  uint32_t a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr uint32_t kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!(d & kAmxBf16) || !(d & kAmxTile)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#elif defined(__x86_64__)
bool has_amx() { return false; }
#endif

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512;
    return has_amx() ? Isa::kAmx : Isa::kAvx512Bf16;
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
