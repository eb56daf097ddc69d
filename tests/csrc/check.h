// SPDX-License-Identifier: BSD-3-Clause
// Checks for tests without a framework: a failure prints where and what, and ends the program.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                          \
  do {                                                                            \
    if (!(condition)) {                                                           \
      std::fprintf(stderr, "FAILED %s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                               \
    }                                                                             \
  } while (0)

/// |actual - expected| <= bound; NaN fails.
#define CHECK_NEAR(actual, expected, bound)                                                 \
  do {                                                                                      \
    const double check_actual = (actual), check_expected = (expected);                      \
    if (!(std::fabs(check_actual - check_expected) <= (bound))) {                           \
      std::fprintf(stderr, "FAILED %s:%d: %s is %.17g, expected %.17g +- %.3g\n", __FILE__, \
                   __LINE__, #actual, check_actual, check_expected, double(bound));         \
      std::exit(1);                                                                         \
    }                                                                                       \
  } while (0)
