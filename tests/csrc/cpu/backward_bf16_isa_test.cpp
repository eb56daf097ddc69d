// SPDX-License-Identifier: BSD-3-Clause
// The bf16 backward in pairs.
#include "cpu/bf16_program.h"

#if defined(FLASH_CPU_BF16)
#include "cpu/backward.h"
#include "cpu/backward_checks.h"

using namespace flash;

int main(int argc, char** argv) {
  tested_backward = {"bf16", cpu::backward_workspace_bytes, cpu::run_backward, true};
  return bf16_program("backward_bf16", argc, argv,
                      [](std::mt19937_64& generator) { check_dtype(DType::kBFloat16, generator); });
}
#else
int main() {}
#endif
