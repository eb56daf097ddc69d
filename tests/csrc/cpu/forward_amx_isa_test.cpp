// SPDX-License-Identifier: BSD-3-Clause
// The bf16 forward on tile registers: in memory where the compiler is not told of any, so that
// machines without them test it too. It takes vectors of 16 floats, whatever number type this is
// compiled for.
#if defined(__AVX512F__)
#undef FLASH_CPU_REAL
#define FLASH_CPU_AMX
#include "cpu/forward.h"
#include "cpu/forward_checks.h"

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

using namespace flash;

int main(int argc, char** argv) {
#if defined(__AMX_BF16__)
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) {  // as isa.cpp asks
    std::printf("forward_amx: this process may not use tile registers\n");
    return 0;
  }
#endif
  seed_of_run = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}();
  std::printf("forward_amx: seed %llu\n", (unsigned long long)seed_of_run);
  tested = {"amx", cpu::forward_workspace_bytes, cpu::forward, true};
  std::mt19937_64 generator(seed_of_run);
  check_dtype(DType::kBFloat16, generator);
}
#else
int main() {}
#endif
