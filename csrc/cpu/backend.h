// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "attention/backend.h"

namespace flash::cpu {

const Backend& backend();

/// Instruction sets that this build has and this machine runs, best last: "portable", "avx2",
/// "avx512", "avx512_bf16", "amx".
std::vector<std::string> available_isas();
/// Name of the one in use.
const char* current_isa();
/// Uses a lower one from now on (process-wide); throws std::invalid_argument for one that is not
/// available, with the list. "" returns to the best.
void set_isa(const std::string& name);

}  // namespace flash::cpu
