// SPDX-License-Identifier: BSD-3-Clause
// Whether a program compiled for tile registers may use them.
#pragma once

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <cstdio>

namespace flash {

/// Asks as isa.cpp does; true where there is nothing to ask.
inline bool may_use_tiles() {
#if defined(__AMX_BF16__)
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) {
    std::printf("this process may not use tile registers\n");
    return false;
  }
#endif
  return true;
}

}  // namespace flash
