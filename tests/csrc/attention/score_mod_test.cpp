// SPDX-License-Identifier: BSD-3-Clause
// Each feature of a score, alone and together: its value against the formula in double, and the
// derivative that stands beside it against a numeric one.
#include "attention/score_mod.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "attention/features.h"
#include "check.h"

using flash::PairView;
using flash::ScalarPlace;
using flash::ScoreCoord;
using flash::ScoreMod;

namespace {

constexpr int kBatch = 2, kHeads = 3, kQueries = 4, kKeys = 5, kDiagonal = 1;
long derivatives = 0;

struct Switches {
  bool softcap, bias, alibi, mask;
};

template <class Real>
struct Inputs {
  std::vector<Real> bias, slopes;
  std::vector<uint8_t> mask;

  Inputs() {
    for (int i = 0; i < kBatch * kHeads * kQueries * kKeys; ++i) {
      bias.push_back(Real(std::sin(1 + i * 0.7)));
      mask.push_back(i % 3 != 0);
    }
    for (int i = 0; i < kBatch * kHeads; ++i) slopes.push_back(Real(0.1 + 0.3 * i));
  }
  ScoreMod mod(Switches on, double cap) const {
    ScoreMod m;
    if (on.softcap) m.softcap = cap;
    if (on.bias) m.bias = {bias.data(), kHeads * kQueries * kKeys, kQueries * kKeys, kKeys, 1};
    if (on.mask) m.mask = {mask.data(), kHeads * kQueries * kKeys, kQueries * kKeys, kKeys, 1};
    if (on.alibi) {
      m.alibi_slopes = slopes.data();
      m.slopes_batch_stride = kHeads;
      m.slopes_head_stride = 1;
    }
    return m;
  }
};

template <class Real>
flash::ModifiedScore<Real> apply(const ScoreMod& mod, Real s, ScoreCoord c) {
  const auto widen = [](Real x) { return x; };
  return mod.forward<Real>(s, ScalarPlace<Real, Real, decltype(widen)>{mod, c, kDiagonal, widen});
}

template <class Real>
double formula(const Inputs<Real>& in, Switches on, double cap, double s, ScoreCoord c) {
  const int pair = ((c.batch * kHeads + c.head) * kQueries + c.q) * kKeys + c.k;
  if (on.softcap) s = cap * std::tanh(s / cap);
  if (on.bias) s += double(in.bias[pair]);
  if (on.alibi) s -= double(in.slopes[c.batch * kHeads + c.head]) * std::abs(c.q + kDiagonal - c.k);
  return on.mask && !in.mask[pair] ? -INFINITY : s;
}

template <class Real>
void check_features(double step, double bound) {
  Inputs<Real> in;
  for (int switches = 0; switches < 16; ++switches) {
    const Switches on{bool(switches & 1), bool(switches & 2), bool(switches & 4),
                      bool(switches & 8)};
    for (double cap : {0.5, 20.0, 50.0}) {
      const ScoreMod mod = in.mod(on, cap);
      CHECK(mod.enabled() == (switches != 0));
      for (int pair = 0; pair < kBatch * kHeads * kQueries * kKeys; ++pair) {
        const ScoreCoord c{pair / (kHeads * kQueries * kKeys), pair / (kQueries * kKeys) % kHeads,
                           pair / kKeys % kQueries, pair % kKeys};
        for (double s : {-30.0, -1.0, 0.0, 2.0, 55.0}) {
          const auto result = apply<Real>(mod, Real(s), c);
          const double expected = formula(in, on, cap, s, c);
          if (std::isinf(expected)) {
            CHECK(double(result.score) == expected);
            continue;
          }
          CHECK_NEAR(result.score, expected, bound * (1 + std::fabs(expected)));
          const double numeric =
              (formula(in, on, cap, s + step, c) - formula(in, on, cap, s - step, c)) / (2 * step);
          CHECK_NEAR(mod.backward(Real(3), result.slope), 3 * numeric, 3 * bound);
          ++derivatives;
        }
      }
    }
  }
}

/// d/dbias = 1 and d/dslope = -distance, by moving the parameter itself.
void check_parameters() {
  Inputs<double> in;
  const Switches on{true, true, true, false};
  const double step = 1e-6;
  for (int pair = 0; pair < kBatch * kHeads * kQueries * kKeys; ++pair) {
    const ScoreCoord c{pair / (kHeads * kQueries * kKeys), pair / (kQueries * kKeys) % kHeads,
                       pair / kKeys % kQueries, pair % kKeys};
    const double before = apply<double>(in.mod(on, 5), 1.5, c).score;
    in.bias[pair] += step;
    const double after_bias = apply<double>(in.mod(on, 5), 1.5, c).score;
    in.bias[pair] -= step;
    double& slope = in.slopes[c.batch * kHeads + c.head];
    slope += step;
    const double after_slope = apply<double>(in.mod(on, 5), 1.5, c).score;
    slope -= step;
    CHECK_NEAR((after_bias - before) / step, 1, 1e-8);
    const double distance = std::abs(c.q + kDiagonal - c.k);
    CHECK_NEAR((after_slope - before) / step, -distance, 1e-8 * (1 + distance));
    CHECK((flash::alibi_term<double, double>(1, distance)) == -distance);
  }
}

void check_extremes() {
  Inputs<float> in;
  const ScoreCoord c{1, 2, 3, 4};
  const ScoreMod capped = in.mod({true, false, false, false}, 30);
  for (float s : {INFINITY, 1e30f}) {
    CHECK(apply<float>(capped, s, c).score == 30.f && apply<float>(capped, s, c).slope == 0.f);
    CHECK(apply<float>(capped, -s, c).score == -30.f && apply<float>(capped, -s, c).slope == 0.f);
  }
  CHECK(std::isnan(apply<float>(capped, NAN, c).score));
  const ScoreMod off = in.mod({}, 0);
  CHECK(apply<float>(off, 133120.f, c).score == 133120.f);
  CHECK(apply<float>(off, 1.f, c).slope == 1.f && off.backward(2.f, 1.f) == 2.f);
  // A dropped pair is overwritten, not added to.
  const ScoreMod masked = in.mod({false, false, false, true}, 0);
  CHECK(apply<float>(masked, NAN, {0, 0, 0, 0}).score == -INFINITY);
  CHECK(apply<float>(masked, INFINITY, {0, 0, 0, 0}).score == -INFINITY);
}

/// Strides of 0 broadcast, negative distances are positive, a float32 bias beside 16-bit inputs.
void check_addressing() {
  const PairView view{nullptr, 1000, 0, 7, -1};
  CHECK(view.offset({2, 9, 3, 4}) == 2000 + 21 - 4);
  const PairView huge{nullptr, int64_t(1) << 40, 0, int64_t(1) << 33, 1};
  CHECK(huge.offset({1, 0, 3, 0}) == (int64_t(1) << 40) + 3 * (int64_t(1) << 33));

  const float bias[2] = {0.5f, 1.5f};
  ScoreMod mod;
  mod.bias = {bias, 0, 0, 0, 1};
  mod.bias_is_float32 = true;
  const auto widen = [](uint16_t) { return 100.f; };
  CHECK((mod.bias_at<float, uint16_t>({5, 6, 7, 1}, widen) == 1.5f));
  mod.bias_is_float32 = false;
  CHECK((mod.bias_at<float, uint16_t>({5, 6, 7, 1}, widen) == 100.f));

  const double slopes[3] = {1, 2, 3};
  mod.alibi_slopes = slopes;
  mod.slopes_head_stride = 1;
  CHECK(mod.slope_of<double>(9, 2) == 3);
}

void check_switches() {
  flash::Features features;
  CHECK(!features.enabled());
  const float logits[4] = {1, 2, 3, 4};
  features.sink = {logits, 2};
  CHECK(features.enabled() && features.sink.of<float>(1) == 3);
  features = {};
  const int64_t rng_state[2] = {1, 2};
  features.dropout.rng_state = rng_state;
  CHECK(features.enabled());
}

}  // namespace

int main() {
  check_features<double>(/*step=*/1e-5, /*bound=*/1e-8);
  check_features<float>(/*step=*/1e-5, /*bound=*/2e-6);
  check_parameters();
  check_extremes();
  check_addressing();
  check_switches();
  std::printf("score_mod_test: %ld derivatives\n", derivatives);
}
