// SPDX-License-Identifier: BSD-3-Clause
// The bf16 backward in pairs, as forward_bf16_isa_test.cpp tests the forward.
#if defined(__AVX512F__)
#undef FLASH_CPU_REAL
#define FLASH_CPU_BF16
#include "cpu/backward.h"
#include "cpu/backward_checks.h"
#include "cpu/tile_permission.h"

using namespace flash;

int main(int argc, char** argv) {
  if (!may_use_tiles()) return 0;
  seed_of_run = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}();
  std::printf("backward_bf16: seed %llu\n", (unsigned long long)seed_of_run);
  tested_backward = {"bf16", cpu::backward_workspace_bytes, cpu::run_backward, true};
  std::mt19937_64 generator(seed_of_run);
  check_dtype(DType::kBFloat16, generator);
}
#else
int main() {}
#endif
