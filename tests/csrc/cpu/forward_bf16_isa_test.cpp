// SPDX-License-Identifier: BSD-3-Clause
// The bf16 forward in pairs.
#include "cpu/bf16_program.h"

#if defined(FLASH_CPU_BF16)
#include "cpu/forward.h"
#include "cpu/forward_checks.h"

using namespace flash;

int main(int argc, char** argv) {
  tested = {"bf16", cpu::forward_workspace_bytes, cpu::forward, true};
  return bf16_program("forward_bf16", argc, argv,
                      [](std::mt19937_64& generator) { check_dtype(DType::kBFloat16, generator); });
}
#else
int main() {}
#endif
