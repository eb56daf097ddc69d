// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

namespace flash::cpu {

/// Instruction sets that kernels are compiled for, each a superset of those before it. kAmx adds
/// tile registers for bf16.
enum class Isa : uint8_t { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

/// The best one that this machine and its operating system run.
Isa detected_isa();
/// The one in use: the detected one, or a lower one that set_isa named.
Isa active_isa();

}  // namespace flash::cpu
