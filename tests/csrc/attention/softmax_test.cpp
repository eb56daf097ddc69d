// SPDX-License-Identifier: BSD-3-Clause
// One row in blocks, and merges of partial rows, against a softmax in long double.
#include "attention/softmax.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <random>
#include <vector>

#include "check.h"

using flash::merge_weights;
using flash::MergeWeights;
using flash::OnlineSoftmaxRow;

namespace {

template <class Real>
struct Partial {
  Real out = 0, lse = -INFINITY;
};

/// As a kernel does it: blocks of keys; the maximum ignores NaN, as fmax does.
template <class Real>
Partial<Real> online(const std::vector<Real>& s, const std::vector<Real>& v, int begin, int end,
                     int block, const Real* sink = nullptr) {
  OnlineSoftmaxRow<Real> row;
  Real out = 0;
  for (; begin < end; begin += block) {
    const int stop = std::min(begin + block, end);
    Real block_max = -INFINITY;
    for (int i = begin; i < stop; ++i) block_max = std::fmax(block_max, s[i]);
    out *= row.rescale(block_max);
    for (int i = begin; i < stop; ++i) {
      const Real p = row.weight(s[i]);
      row.sum += p;
      out += p * v[i];
    }
  }
  if (sink) {
    const Real before = row.max;
    row.add_sink(*sink);
    if (row.max != before && row.max != -INFINITY) out *= std::exp(before - row.max);
  }
  return {row.sum == 0 ? Real(0) : out / row.sum, row.lse()};
}

template <class Real>
Partial<Real> merge(Partial<Real> a, Partial<Real> b) {
  const MergeWeights<Real> w = merge_weights(a.lse, b.lse);
  return {w.a * a.out + w.b * b.out, w.lse};
}

struct Exact {
  double out, lse;
};

template <class Real>
Exact exact(const std::vector<Real>& s, const std::vector<Real>& v, const Real* sink) {
  long double max = *std::max_element(s.begin(), s.end());
  if (sink) max = std::max<long double>(max, *sink);
  if (std::isinf(max)) return {0, -INFINITY};
  long double sum = sink ? std::exp((long double)(*sink) - max) : 0, out = 0;
  for (size_t i = 0; i < s.size(); ++i) {
    const long double p = std::exp((long double)(s[i]) - max);
    sum += p;
    out += p * v[i];
  }
  return {double(out / sum), double(max + std::log(sum))};
}

template <class Real>
void check_rows() {
  const double unit = std::numeric_limits<Real>::epsilon();
  std::mt19937 rng(1);
  std::normal_distribution<double> normal;
  for (double magnitude : {0.0, 1.0, 8.0, 100.0}) {
    for (int trial = 0; trial < 200; ++trial) {
      const int n = 1 + trial % 97;
      std::vector<Real> s(n), v(n);
      double largest = 1;
      for (int i = 0; i < n; ++i) {
        s[i] = Real(magnitude * normal(rng) + (trial % 5 == 2 ? 1e4 : 0));
        v[i] = Real(normal(rng));
        largest = std::max(largest, std::fabs(double(s[i])));
        if (trial % 4 == 1 && i < 40) s[i] = -INFINITY;  // the first blocks are fully masked
        if (trial % 4 == 3 && i % 2) s[i] = -INFINITY;
      }
      const Real logit = Real(normal(rng) * magnitude);
      for (const Real* sink : {static_cast<const Real*>(nullptr), &logit}) {
        const Exact expected = exact(s, v, sink);
        for (int block : {1, 7, 64}) {
          const Partial<Real> whole = online(s, v, 0, n, block, sink);
          CHECK(std::isinf(expected.lse) == std::isinf(double(whole.lse)));
          if (std::isinf(expected.lse)) {
            CHECK(whole.out == 0 && whole.lse == -INFINITY);
            continue;
          }
          CHECK_NEAR(whole.lse, expected.lse, 8 * unit * largest);
          CHECK_NEAR(whole.out, expected.out, 32 * unit * largest);
        }
        for (int parts : {2, 3, 8}) {
          Partial<Real> total;
          for (int part = 0; part < parts; ++part)
            total = merge(total, online(s, v, n * part / parts, n * (part + 1) / parts, 7));
          if (sink) total = merge(total, {Real(0), *sink});
          if (std::isinf(expected.lse)) {
            CHECK(total.out == 0 && total.lse == -INFINITY);
            continue;
          }
          CHECK_NEAR(total.lse, expected.lse, 8 * parts * unit * largest);
          CHECK_NEAR(total.out, expected.out, 32 * parts * unit * largest);
        }
      }
    }
  }
}

template <class Real>
void check_empty_rows() {
  const std::vector<Real> masked(5, -INFINITY), v{1, 2, 3, 4, 5};
  const Partial<Real> empty = online(masked, v, 0, 5, 2);
  CHECK(empty.out == 0 && empty.lse == -INFINITY);
  const Real sink = Real(-3.5);
  const Partial<Real> only_sink = online(masked, v, 0, 5, 2, &sink);
  CHECK(only_sink.out == 0 && only_sink.lse == sink);
  const Real no_sink = -INFINITY;
  CHECK(online(masked, v, 0, 5, 2, &no_sink).lse == -INFINITY);

  const MergeWeights<Real> both = merge_weights<Real>(-INFINITY, -INFINITY);
  CHECK(both.a == 0 && both.b == 0 && both.lse == -INFINITY);
  const MergeWeights<Real> left = merge_weights<Real>(3, -INFINITY);
  CHECK(left.a == 1 && left.b == 0 && left.lse == 3);
  const MergeWeights<Real> right = merge_weights<Real>(-INFINITY, 3);
  CHECK(right.a == 0 && right.b == 1 && right.lse == 3);
}

template <class Real>
void check_large_and_not_finite() {
  CHECK(merge_weights<Real>(-2000, 2000).b == 1 && merge_weights<Real>(-2000, 2000).lse == 2000);
  const Real nan = std::numeric_limits<Real>::quiet_NaN();
  for (Real other : {Real(1), Real(-INFINITY), Real(INFINITY), nan}) {
    CHECK(std::isnan(merge_weights(nan, other).lse) && std::isnan(merge_weights(nan, other).a));
    CHECK(std::isnan(merge_weights(other, nan).lse) && std::isnan(merge_weights(other, nan).b));
  }
  // A NaN score that is attended reaches the whole row, wherever it stands, also where every other
  // score is masked; so does +inf.
  const std::vector<Real> v{1, 2, 3, 4};
  for (Real bad : {nan, Real(INFINITY)}) {
    for (Real others : {Real(0), Real(-INFINITY)}) {
      for (int at = 0; at < 4; ++at) {
        std::vector<Real> s(4, others);
        s[at] = bad;
        for (int block : {1, 2, 4}) {
          const Partial<Real> row = online(s, v, 0, 4, block);
          CHECK(std::isnan(row.out) && std::isnan(row.lse));
        }
      }
    }
  }
  // Finite scores of any size stay finite.
  const Real huge = std::numeric_limits<Real>::max() / 4;
  const Partial<Real> row = online<Real>({huge, -huge, huge, 0}, v, 0, 4, 2);
  CHECK(row.out == 2 && std::isfinite(row.lse));
}

}  // namespace

int main() {
  check_rows<float>();
  check_rows<double>();
  check_empty_rows<float>();
  check_empty_rows<double>();
  check_large_and_not_finite<float>();
  check_large_and_not_finite<double>();
  std::printf("softmax_test: ok\n");
}
