// SPDX-License-Identifier: BSD-3-Clause
// What the tests of products in pairs share: they include kernels, so that each is compiled for
// tile registers, for AVX-512's bf16, and, where the compiler is told of neither, for tiles in
// memory, which machines without them test too. Vectors have 16 floats, whatever number type the
// program is compiled for.
#pragma once

#if defined(__AVX512F__)
#undef FLASH_CPU_REAL
#define FLASH_CPU_BF16
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include "cpu/forward_case.h"

namespace flash {

/// Runs check(generator), with the seed that was given or a new one.
template <class Check>
int bf16_program(const char* name, int argc, char** argv, Check&& check) {
#if defined(__AMX_BF16__)
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) {  // as isa.cpp asks
    std::printf("%s: this process may not use tile registers\n", name);
    return 0;
  }
#endif
  seed_of_run = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}();
  std::printf("%s: seed %llu\n", name, (unsigned long long)seed_of_run);
  std::mt19937_64 generator(seed_of_run);
  check(generator);
  return 0;
}

}  // namespace flash
