// SPDX-License-Identifier: BSD-3-Clause
// The bf16 forward in pairs: by tile registers, by AVX-512's bf16, and, where the compiler is told
// of neither, by tiles in memory, so that machines without them test that too. It takes vectors of
// 16 floats, whatever number type this is compiled for.
#if defined(__AVX512F__)
#undef FLASH_CPU_REAL
#define FLASH_CPU_BF16
#include "cpu/forward.h"
#include "cpu/forward_checks.h"
#include "cpu/tile_permission.h"

using namespace flash;

int main(int argc, char** argv) {
  if (!may_use_tiles()) return 0;
  seed_of_run = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}();
  std::printf("forward_bf16: seed %llu\n", (unsigned long long)seed_of_run);
  tested = {"bf16", cpu::forward_workspace_bytes, cpu::forward, true};
  std::mt19937_64 generator(seed_of_run);
  check_dtype(DType::kBFloat16, generator);
}
#else
int main() {}
#endif
