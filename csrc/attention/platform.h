// SPDX-License-Identifier: BSD-3-Clause
#pragma once

// A function that must mean the same on the host and on the device.
//
// always_inline matters on the host: these headers are compiled once per instruction set by the CPU
// backend. A plain `inline` function may be emitted out of line in every object, and the linker
// keeps one copy of its choice; if that is the AVX-512 copy, an older CPU dies of an illegal
// instruction. An always_inline function leaves no copy.
#if defined(__CUDACC__)
#define FLASH_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FLASH_HOST_DEVICE inline __attribute__((always_inline))
#endif
