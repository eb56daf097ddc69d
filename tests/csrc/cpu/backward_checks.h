// SPDX-License-Identifier: BSD-3-Clause
// The CPU backward against the formula in fp64: what every object that has it must pass.
#pragma once

#include "check.h"
#include "cpu/backward_case.h"

namespace flash {
namespace {

double most_units;  // that an error has had

void print(const ForwardCase& c, uint64_t seed) {
  std::fprintf(stderr,
               "%s dtype %d b %d h %d/%d sq %d sk %d d %d dv %d scale %g mask %d %d %d %d packed "
               "%d seqused %d softcap %g bias %d (fp32 %d) mask %d broadcast %d alibi %d sink %d "
               "dropout %g; seed %llu\n",
               tested_backward.name, int(c.dtype), c.batch, c.heads, c.heads_k, c.sq, c.sk, c.d,
               c.dv, c.scale, c.mask.bottom_right, c.mask.window_left, c.mask.window_right,
               c.mask.prefix, c.packed, c.seqused, c.softcap, c.bias, c.bias_is_float32,
               c.bool_mask, c.broadcast, c.alibi, c.sink, c.dropout_p, (unsigned long long)seed);
}

/// One rounding to the result's dtype, and kUnits times what the roundings before it may make.
constexpr double kUnits = 6;

void check_gradient(const char* name, const std::vector<double>& got,
                    const std::vector<double>& expected, const std::vector<double>& error_units,
                    DType result, DType accumulation, const ForwardCase& c, uint64_t seed) {
  CHECK(got.size() == expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    const double rounding = roundoff(result) * std::fabs(expected[i]) + half_spacing_at_0(result);
    const double unit = roundoff(accumulation) * error_units[i];
    const double error = std::fabs(got[i] - expected[i]), bound = rounding + kUnits * unit;
    if (error > rounding) most_units = std::fmax(most_units, (error - rounding) / unit);
    if (!(error <= bound)) {
      print(c, seed);
      std::fprintf(stderr, "%s[%zu]\n", name, i);
    }
    CHECK_NEAR(got[i], expected[i], bound);
  }
}

void check_case(const ForwardCase& c, bool with_dlse, uint64_t seed, int threads) {
  BackwardCall call(c, with_dlse, seed);
  reference::Gradients units;
  const double operands =
      tested_backward.rounds_operands && c.dtype == DType::kBFloat16
          ? roundoff(c.dtype) * (1 + roundoff(c.dtype)) / (kUnits * roundoff(call.accumulation()))
          : 0;
  const reference::Gradients expected = reference::backward(call.p, &call.saved, &units, operands);
  const reference::Gradients got = call.run(threads);
  const DType acc = call.accumulation();
  auto check = [&](const char* name, std::vector<double> reference::Gradients::* of, DType result) {
    check_gradient(name, got.*of, expected.*of, units.*of, result, acc, c, seed);
  };
  check("dq", &reference::Gradients::dq, c.dtype);
  check("dk", &reference::Gradients::dk, c.dtype);
  check("dv", &reference::Gradients::dv, c.dtype);
  if (c.bias) check("dbias", &reference::Gradients::dbias, call.bias_dtype());
  if (c.alibi) check("dslopes", &reference::Gradients::dslopes, acc);
  if (c.sink) check("dsink", &reference::Gradients::dsink, acc);
}

ForwardCase random_case(std::mt19937_64& generator) {
  Choice choose{generator};
  ForwardCase c;
  c.batch = choose({1, 2, 3});
  c.heads_k = choose({1, 2});
  c.heads = c.heads_k * choose({1, 1, 2, 3});
  c.sq = choose({1, 2, 7, 47, 48, 49, 95, 97, 150, 200});
  c.sk = choose({0, 1, 5, 63, 64, 65, 128, 150});
  c.d = choose({1, 3, 8, 16, 40, 64, 80});
  c.dv = choose({1, 5, 8, 17, 64, 72});
  choose_features(choose, c);
  return c;
}

using flash::same_bits;
bool same_bits(const reference::Gradients& a, const reference::Gradients& b) {
  return same_bits(a.dq, b.dq) && same_bits(a.dk, b.dk) && same_bits(a.dv, b.dv) &&
         same_bits(a.dbias, b.dbias) && same_bits(a.dslopes, b.dslopes) &&
         same_bits(a.dsink, b.dsink);
}

/// The same bits for every number of threads, whether they share a head or not, and every time.
void check_repeatable(DType dtype) {
  ForwardCase c{.dtype = dtype, .sq = 210, .sk = 200, .d = 24, .dv = 16, .mask = {true, 100, 0, 0}};
  for (int heads_k : {1, 5}) {
    for (bool features : {false, true}) {
      c.heads_k = heads_k, c.heads = 2 * heads_k;
      c.bias = c.alibi = c.sink = features;
      c.dropout_p = features ? 0.2 : 0;
      for (int broadcast : features ? std::vector<int>{0, 2, 8, 15} : std::vector<int>{0}) {
        c.broadcast = broadcast;
        BackwardCall call(c, true, seed_of_run);
        const reference::Gradients one = call.run(1);
        for (int threads : {2, 2, 3, 7}) CHECK(same_bits(one, call.run(threads)));
      }
    }
  }
}

/// What is not wanted is not touched and changes nothing else.
void check_wanted(DType dtype) {
  const ForwardCase c{.dtype = dtype,
                      .heads = 2,
                      .sq = 120,
                      .sk = 130,
                      .d = 24,
                      .dv = 40,
                      .mask = {false, kUnbounded, 0, 0},
                      .bias = true,
                      .alibi = true,
                      .sink = true};
  BackwardCall all(c, false, seed_of_run);
  const reference::Gradients expected = all.run(2);
  for (int wanted = 0; wanted < 64; ++wanted) {
    BackwardCall some = all;
    reference::Gradients masked = expected;
    auto drop = [&](int bit, void*& data, std::vector<double>& values) {
      if (wanted >> bit & 1) return;
      data = nullptr;
      values.assign(values.size(), 0.0);
    };
    drop(0, some.p.dq.data, masked.dq);
    drop(1, some.p.dk.data, masked.dk);
    drop(2, some.p.dv.data, masked.dv);
    drop(3, some.p.dbias, masked.dbias);
    drop(4, some.p.dslopes, masked.dslopes);
    drop(5, some.p.dsink, masked.dsink);
    CHECK(same_bits(masked, some.run(2)));
  }
}

/// A row whose lse a caller gives as +inf or -inf attends nothing.
void check_infinite_lse(DType dtype) {
  const ForwardCase c{.dtype = dtype, .sq = 60, .sk = 70, .d = 16, .dv = 16};
  BackwardCall call(c, false, seed_of_run);
  for (double lse : {INFINITY, -INFINITY}) {
    reference::store(call.accumulation(), call.p.lse.data, 17, lse);
    for (int d = 0; d < c.dv; ++d) call.set(call.p.dout, call.p.q_layout, 0, 0, 17, d, NAN);
    for (int d = 0; d < c.d; ++d) call.set(call.p.q, call.p.q_layout, 0, 0, 17, d, INFINITY);
    const reference::Gradients g = call.run(1);
    for (int d = 0; d < c.d; ++d) CHECK(g.dq[17 * c.d + d] == 0);
    for (const auto* values : {&g.dq, &g.dk, &g.dv}) {
      for (double x : *values) CHECK(std::isfinite(x));
    }
  }
}

/// What keys that do not exist would weigh is not added as infinity times 0: dP overflows beside
/// scores that are all the same, and dQ is what dS of 0 leaves.
void check_magnitudes(DType dtype) {
  if (dtype == DType::kFloat16) return;
  for (int keys : {1, 20, 100}) {
    ForwardCase c{.dtype = dtype, .sq = 30, .sk = keys, .d = 4, .dv = 4, .scale = 8};
    BackwardCall call(c, false, seed_of_run);
    const auto fill = [&](const TensorView& t, const SequenceLayout& layout, double value) {
      for (int i = 0; i < layout.max; ++i) {
        for (int d = 0; d < 4; ++d) call.set(t, layout, 0, 0, i, d, value);
      }
    };
    fill(call.p.q, call.p.q_layout, -30), fill(call.p.k, call.p.k_layout, 30);
    fill(call.p.v, call.p.k_layout, 0x1p99), fill(call.p.out, call.p.q_layout, 0x1p99);
    fill(call.p.dout, call.p.q_layout, 0x1p25);
    for (int i = 0; i < c.sq; ++i) {
      reference::store(call.accumulation(), call.p.lse.data, i, -8.0 * 4 * 900 + std::log(keys));
    }
    for (double x : call.run(1).dq) CHECK(std::isfinite(x));
  }
}

enum class Drop { kCausal, kBoolMask, kBias };
enum class Where { kQ, kK, kV, kDout };

/// NaN and infinity in a row stay with what it meets: the other gradients keep their bits.
void check_poison(DType dtype, Drop drop, Where where) {
  constexpr int kRows = 150, kBad = 77;
  ForwardCase c{.dtype = dtype,
                .heads = 2,
                .heads_k = 2,
                .sq = kRows,
                .sk = kRows,
                .d = 32,
                .dv = 32,
                .broadcast = 1 | 2};
  if (drop == Drop::kCausal) c.mask.window_right = 0;
  c.bool_mask = drop == Drop::kBoolMask;
  c.bias = drop == Drop::kBias;
  BackwardCall call(c, false, seed_of_run);
  call.p.dbias = nullptr;
  BackwardParams& p = call.p;
  const reference::Head head{p, 0, 0};
  auto meets = [&](int i, int j) { return head.kept(i, j) && head.score(i, j).score != -INFINITY; };
  const reference::Gradients clean = call.run(1);
  // What the row's own results become is the caller's: lse of row kBad stays as it was.
  for (double bad : {double(NAN), double(INFINITY)}) {
    BackwardCall dirty(c, false, seed_of_run);
    dirty.p.dbias = nullptr;
    const bool of_query = where == Where::kQ || where == Where::kDout;
    const TensorView& t = where == Where::kQ   ? dirty.p.q
                          : where == Where::kK ? dirty.p.k
                          : where == Where::kV ? dirty.p.v
                                               : dirty.p.dout;
    dirty.set(t, of_query ? dirty.p.q_layout : dirty.p.k_layout, 0, 0, kBad, 3, bad);
    const reference::Gradients got = dirty.run(1);
    for (int row = 0; row < 2 * kRows; ++row) {
      const int at = row % kRows;
      const bool first_head = row < kRows;
      // Does query `at` meet the bad key, or is it bad; does key `at` meet the bad query, or is
      // bad.
      bool q_touched = of_query ? at == kBad : meets(at, kBad);
      bool k_touched = of_query ? meets(kBad, at) : at == kBad;
      // Through S or dP a bad key spoils the rows of dS of its queries, and those no other key's
      // column: dS[i][j] is spoilt for j = kBad alone.
      q_touched = q_touched && first_head, k_touched = k_touched && first_head;
      const double *q1 = &clean.dq[row * c.d], *q2 = &got.dq[row * c.d];
      const double *k1 = &clean.dk[row * c.d], *k2 = &got.dk[row * c.d];
      const double *v1 = &clean.dv[row * c.dv], *v2 = &got.dv[row * c.dv];
      auto equal = [&](const double* a, const double* b, int n) {
        for (int d = 0; d < n; ++d) {
          // Pair by pair the sums round otherwise.
          if (!(std::fabs(a[d] - b[d]) <= 40 * roundoff(dtype) * (1 + std::fabs(a[d]))))
            return false;
        }
        return true;
      };
      if (!q_touched) CHECK(equal(q1, q2, c.d));
      if (!k_touched) CHECK(equal(k1, k2, c.d) && equal(v1, v2, c.dv));
      if (std::isnan(bad) && q_touched) CHECK(std::isnan(q2[3]));
      if (std::isnan(bad) && k_touched) CHECK(std::isnan(k2[3]));
    }
  }
}

void check_sizes(DType dtype) {
  for (ForwardCase c : {ForwardCase{.sq = 0, .sk = 70},
                        {.sq = 70, .sk = 0},
                        {.heads = 0, .heads_k = 0},
                        {.batch = 0},
                        {.sq = 70, .sk = 70, .d = 0},
                        {.sq = 70, .sk = 70, .dv = 0},
                        {.heads = 2, .sq = 40, .sk = 50, .d = 256, .dv = 256, .scale = 0.05},
                        {.heads = 2, .sq = 40, .sk = 50, .d = 512, .dv = 512, .scale = 0.05},
                        {.sq = 300, .sk = 200, .d = 128, .dv = 128, .scale = 0.08}}) {
    c.dtype = dtype;
    for (int threads : {1, 2}) check_case(c, true, seed_of_run, threads);
  }
}

/// All of it for one dtype.
void check_dtype(DType dtype, std::mt19937_64& generator) {
  for (int i = 0; i < 100; ++i) {
    ForwardCase c = random_case(generator);
    c.dtype = dtype;
    check_case(c, i % 2 == 0, seed_of_run + i, 1 + i % 3);
  }
  check_sizes(dtype);
  check_repeatable(dtype);
  check_wanted(dtype);
  check_infinite_lse(dtype);
  check_magnitudes(dtype);
  for (Drop drop : {Drop::kCausal, Drop::kBoolMask, Drop::kBias}) {
    for (Where where : {Where::kQ, Where::kK, Where::kV, Where::kDout}) {
      check_poison(dtype, drop, where);
    }
  }
}

}  // namespace
}  // namespace flash
