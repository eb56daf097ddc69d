// SPDX-License-Identifier: BSD-3-Clause
// Accuracy and edge cases of the vector functions and conversions. Compiled once per instruction
// set and for both Reals (FLASH_CPU_REAL).
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>

#include "cpu/element.h"
#include "cpu/vector.h"

using namespace flash::cpu;

namespace {

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::printf("%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

std::mt19937_64 generator(std::random_device{}());

/// Largest error of f against `exact` over random arguments, in units of the last place.
template <class F, class Exact>
double worst_ulp(double low, double high, F&& f, Exact&& exact) {
  double worst = 0;
  for (int round = 0; round < 100000 / kLanes; ++round) {
    Vector x;
    for (int lane = 0; lane < kLanes; ++lane) {
      x[lane] = Real(std::uniform_real_distribution<double>(low, high)(generator));
    }
    const Vector y = f(x);
    for (int lane = 0; lane < kLanes; ++lane) {
      const long double right = exact((long double)x[lane]);
      const Real nearest = std::fabs(Real(right));
      const Real ulp = std::nextafter(nearest, std::numeric_limits<Real>::infinity()) - nearest;
      worst = std::fmax(worst, double(std::fabs(y[lane] - right)) / double(ulp));
    }
  }
  return worst;
}

Real at(Vector (*f)(Vector), double x) { return f(splat(Real(x)))[0]; }

void check_exp2() {
  const auto exact = [](long double x) { return std::exp2(x); };
  const double least = 1 - Format::kExponentBias;
  for (double low : {-1.0, -20.0, least}) {
    CHECK(worst_ulp(low, 0, exp2_bounded, exact) < 1.7);
    CHECK(worst_ulp(low, -least, exp2_of, exact) < 1.7);
  }
  for (auto f : {exp2_bounded, exp2_of}) {
    CHECK(at(f, 0) == 1 && at(f, -1) == 0.5 && at(f, least) == std::exp2(Real(least)));
    CHECK(at(f, -INFINITY) == 0 && at(f, -1e30) == 0 && at(f, least - 0.1) == 0);
    CHECK(at(f, -std::numeric_limits<Real>::max()) == 0);
    CHECK(std::isnan(at(f, NAN)));
  }
  CHECK(at(exp2_of, 1e30) == INFINITY && at(exp2_of, INFINITY) == INFINITY);
}

void check_tanh() {
  const auto exact = [](long double x) { return std::tanh(x); };
  for (double bound : {1e-6, 0.01, 1.0, 3.0, 30.0}) {
    CHECK(worst_ulp(-bound, bound, tanh_of, exact) < 5);
  }
  CHECK(at(tanh_of, INFINITY) == 1 && at(tanh_of, -INFINITY) == -1 && at(tanh_of, -1e30) == -1);
  CHECK(at(tanh_of, 0) == 0 && std::signbit(at(tanh_of, -0.0)) && std::isnan(at(tanh_of, NAN)));
  CHECK(at(abs_of, -3) == 3 && at(abs_of, 3) == 3);
}

/// Every 16-bit number survives widening and narrowing, and what lies between two neighbours is
/// rounded to the nearer, the middle to the even one.
template <class Element>
void check_conversions(uint16_t infinity, double least) {
  CHECK(widen(Element{1}) == least);
  for (uint32_t i = 0; i < infinity; ++i) {
    for (uint32_t sign : {0u, 0x8000u}) {
      const Element element{uint16_t(i | sign)};
      const float x = widen(element);
      CHECK(narrow<Element>(x).bits == element.bits && std::signbit(x) == (sign != 0));
      if (i + 1 == infinity) continue;
      const float next = widen(Element{uint16_t((i + 1) | sign)});
      CHECK(std::fabs(next) > std::fabs(x));
      const float middle = float((double(x) + double(next)) / 2);
      CHECK(narrow<Element>(middle).bits == (i % 2 ? i + 1 : i) + sign);
      CHECK(narrow<Element>(std::nextafter(middle, x)).bits == i + sign);
      CHECK(narrow<Element>(std::nextafter(middle, next)).bits == i + 1 + sign);
    }
  }
  CHECK(widen(Element{infinity}) == INFINITY && narrow<Element>(INFINITY).bits == infinity);
  CHECK(widen(Element{uint16_t(infinity | 0x8000)}) == -INFINITY);
  CHECK(narrow<Element>(std::numeric_limits<float>::max()).bits == infinity);
  CHECK(std::isnan(widen(Element{uint16_t(infinity + 1)})));
  CHECK(std::isnan(widen(narrow<Element>(NAN))));
  CHECK(std::isnan(widen(narrow<Element>(float_of(0x7f800001)))));

  Element row[37];
  float wide[37];
  for (int i = 0; i < 37; ++i) row[i] = {uint16_t(generator() % infinity)};
  widen_row(row, 37, wide);
  for (int i = 0; i < 37; ++i) CHECK(wide[i] == widen(row[i]));
}

}  // namespace

int main() {
  check_exp2();
  check_tanh();
  if constexpr (sizeof(Real) == 4) {
    check_conversions<BFloat16>(0x7f80, 0x1p-133);
    check_conversions<Float16>(0x7c00, 0x1p-24);
  }
  std::printf("vector_test: %d lanes of %d bytes: ok\n", kLanes, int(sizeof(Real)));
}
