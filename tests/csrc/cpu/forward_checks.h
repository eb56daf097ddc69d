// SPDX-License-Identifier: BSD-3-Clause
// The CPU forward against the formula in fp64: what every object that has it must pass.
#pragma once

#include "check.h"
#include "cpu/forward_case.h"

namespace flash {
namespace {

/// The largest sum of magnitudes that a score of the call is made of: its error is a few roundoffs
/// of that, and is the relative error of the weight.
double largest_score(const ForwardParams& p) {
  double largest = 1;
  for (int b = 0; b < p.batch; ++b) {
    for (int h = 0; h < p.num_heads; ++h) {
      const reference::Head head{p, b, h};
      for (int i = 0; i < head.qs.length; ++i) {
        for (int j = 0; j < head.ks.length; ++j) {
          if (!head.kept(i, j)) continue;
          double sum = 0;
          for (int d = 0; d < p.head_dim; ++d) sum += std::fabs(head.q(i, d) * head.k(j, d));
          sum *= std::fabs(p.softmax_scale);
          const double score = std::fabs(head.score(i, j).score);
          largest = std::fmax(largest, sum);
          if (std::isfinite(score)) largest = std::fmax(largest, score);
        }
      }
    }
  }
  return largest;
}

/// The weights of bf16 are rounded before the product where it is made in pairs: an error of up to
/// half a unit of the last place of each.
double weight_error(const ForwardParams& p) {
  double largest = 0;
  if (!tested.rounds_weights || p.dtype != DType::kBFloat16) return 0;
  for (int b = 0; b < p.batch; ++b) {
    for (int h = 0; h < p.num_heads; ++h) {
      const reference::Head head{p, b, h};
      for (int j = 0; j < head.ks.length; ++j) {
        for (int d = 0; d < p.head_dim_v; ++d)
          largest = std::fmax(largest, std::fabs(head.v(j, d)));
      }
    }
  }
  return 0x1p-9 * largest;
}

void check_case(const ForwardCase& c, uint64_t seed) {
  ForwardCall call(c, seed);
  const reference::Result expected = reference::forward(call.p), got = call.run(1);
  // Of fp64, the reference has its own.
  const double score_error = (c.dtype == DType::kFloat64 ? 2 : 1) * 4 *
                             roundoff(reference::accumulation(c.dtype)) * largest_score(call.p);
  double largest_out = 0, largest_v = 1;
  for (double x : expected.out) largest_out = std::fmax(largest_out, std::fabs(x));
  largest_v = std::fmax(largest_v, 3 * largest_out) / (1 - (c.dropout_p < 1 ? c.dropout_p : 0));
  const double weights = weight_error(call.p) / (1 - (c.dropout_p < 1 ? c.dropout_p : 0));
  for (size_t i = 0; i < expected.out.size(); ++i) {
    const double bound = roundoff(c.dtype) * std::fabs(expected.out[i]) + score_error * largest_v +
                         weights * (1 + roundoff(c.dtype)) +
                         (c.dtype == DType::kFloat16 ? 0x1p-25 : 0);
    if (!(std::fabs(got.out[i] - expected.out[i]) <= bound)) {
      std::fprintf(
          stderr,
          "%s dtype %d b %d h %d/%d sq %d sk %d d %d dv %d scale %g packed %d seqused %d "
          "softcap %g bias %d mask %d broadcast %d alibi %d sink %d dropout %g; seed %llu\n",
          tested.name, int(c.dtype), c.batch, c.heads, c.heads_k, c.sq, c.sk, c.d, c.dv, c.scale,
          c.packed, c.seqused, c.softcap, c.bias, c.bool_mask, c.broadcast, c.alibi, c.sink,
          c.dropout_p, (unsigned long long)seed);
    }
    CHECK_NEAR(got.out[i], expected.out[i], bound);
  }
  for (size_t i = 0; i < expected.lse.size(); ++i) {
    if (expected.lse[i] == -INFINITY) {
      CHECK(got.lse[i] == -INFINITY);
    } else {
      const double rounding =
          (c.dtype == DType::kFloat64 ? 6 : 3) * roundoff(reference::accumulation(c.dtype));
      CHECK_NEAR(got.lse[i], expected.lse[i], score_error + rounding * std::fabs(expected.lse[i]));
    }
  }
}

ForwardCase random_case(std::mt19937_64& generator) {
  Choice choose{generator};
  ForwardCase c;
  c.batch = choose({1, 2, 3});
  c.heads_k = choose({1, 2});
  c.heads = c.heads_k * choose({1, 1, 2, 3, 5});
  c.sq = choose({1, 2, 7, 16, 47, 48, 49, 63, 100, 200});
  c.sk = choose({0, 1, 5, 63, 64, 65, 128, 150});
  c.d = choose({1, 3, 8, 16, 40, 64});
  c.dv = choose({1, 5, 8, 17, 64});
  if (c.sq * c.heads <= 4 * c.heads_k) c.sk = choose({c.sk, 513, 1200});  // in spans
  choose_features(choose, c);
  return c;
}

/// The same bits for every thread count: of many queries, and of few, whose keys are in spans.
void check_threads(const ForwardCase& c) {
  const ForwardCall call(c, seed_of_run);
  const reference::Result one = ForwardCall(call).run(1);
  for (int threads : {2, 3, 7}) {
    const reference::Result other = ForwardCall(call).run(threads);
    CHECK(same_bits(one.out, other.out) && same_bits(one.lse, other.lse));
  }
}

/// The same bits for every thread count, and for a row whatever rows are computed with it.
void check_repeatable(DType dtype) {
  ForwardCase c{.dtype = dtype,
                .batch = 2,
                .heads = 4,
                .heads_k = 2,
                .sq = 230,
                .sk = 330,
                .d = 64,
                .dv = 64,
                .mask = {true, 100, 0, 0}};
  for (double p : {0.0, 0.2}) {
    c.dropout_p = p;
    check_threads(c);
    ForwardCase few = c;
    few.sq = 2, few.sk = 1900, few.mask = {true, 1500, 0, 0};
    check_threads(few);
    few.packed = few.seqused = few.sink = true;
    check_threads(few);
    if (p > 0) continue;  // keyed by the position, which changes below
    ForwardCall call(c, seed_of_run);
    const reference::Result one = call.run(1);
    // Bottom right: the last rows keep their mask. One or two rows take another kernel.
    for (int last : {3, 5, 17, 40, 100}) {
      ForwardCall tail = call;
      tail.p.q_layout.max = last;
      tail.p.q.data = static_cast<char*>(call.p.q.data) +
                      (c.sq - last) * call.p.q.row_stride * element_bytes(dtype);
      const reference::Result rows = tail.run(2);
      for (int head = 0; head < c.batch * c.heads; ++head) {
        CHECK(std::memcmp(&rows.out[int64_t(head) * last * c.dv],
                          &one.out[(int64_t(head) * c.sq + c.sq - last) * c.dv],
                          last * c.dv * sizeof(double)) == 0);
      }
    }
  }
}

/// A probability of 1e-30 and a mask that keeps everything change no bit.
void check_neutral_features(DType dtype) {
  const ForwardCase c{
      .dtype = dtype, .sq = 70, .sk = 90, .d = 32, .dv = 32, .mask = {false, 5, 0, 0}};
  ForwardCall call(c, seed_of_run);
  const reference::Result plain = call.run(1);
  const int64_t state[2] = {1, 2};
  call.p.features.dropout = {state, 65536, 1.f};
  const reference::Result dropout = call.run(1);
  CHECK(same_bits(plain.out, dropout.out) && same_bits(plain.lse, dropout.lse));
  call.p.features = {};
  const uint8_t keep = 1;
  call.p.features.score_mod.mask = {&keep, 0, 0, 0, 0};
  const reference::Result masked = call.run(1);
  CHECK(same_bits(plain.out, masked.out) && same_bits(plain.lse, masked.lse));
}

/// One key: its value, bit for bit. No key: 0 and -inf, or the sink.
void check_few_keys(DType dtype) {
  ForwardCase c{.dtype = dtype, .heads = 3, .sq = 70, .sk = 1, .d = 64, .dv = 64};
  ForwardCall one(c, seed_of_run);
  const reference::Result r = one.run(1);
  for (size_t i = 0; i < r.out.size(); ++i) {
    CHECK(r.out[i] == reference::load(dtype, one.p.v.data, int64_t(i % c.dv)));
  }
  c.heads = 1, c.sk = 40, c.mask = {true, kUnbounded, 0, 0};
  for (bool sink : {false, true}) {
    c.sink = sink;
    ForwardCall empty(c, seed_of_run);
    const reference::Result rows = empty.run(1);
    const double lse =
        sink ? reference::load(reference::accumulation(dtype), empty.p.features.sink.logits, 0)
             : -INFINITY;
    for (int i = 0; i < 30; ++i) {
      CHECK(rows.lse[i] == lse);
      for (int d = 0; d < c.dv; ++d) CHECK(rows.out[i * c.dv + d] == 0);
    }
  }
}

enum class Drop { kCausal, kBoolMask, kBias };

/// NaN and infinity in keys and values stay with the rows that attend them.
void check_poison(DType dtype, Drop drop) {
  constexpr int kRows = 150, kBad = 77;
  ForwardCase c{
      .dtype = dtype, .heads = 2, .sq = kRows, .sk = kRows, .d = 32, .dv = 32, .broadcast = 1 | 2};
  if (drop == Drop::kCausal) c.mask.window_right = 0;
  c.bool_mask = drop == Drop::kBoolMask;
  c.bias = drop == Drop::kBias;
  for (double bad : {double(NAN), double(INFINITY)}) {
    for (bool in_value : {false, true}) {
      ForwardCall clean(c, seed_of_run), dirty(c, seed_of_run);
      const ForwardParams& p = dirty.p;
      dirty.set(in_value ? p.v : p.k, p.k_layout, 0, 0, kBad, 3, bad);
      const reference::Result expected = clean.run(1), got = dirty.run(1);
      const reference::Head head{clean.p, 0, 0};
      for (int row = 0; row < 2 * kRows; ++row) {
        const int i = row % kRows;
        const bool attends = head.kept(i, kBad) && head.score(i, kBad).score != -INFINITY;
        const double *x = &got.out[row * c.dv], *y = &expected.out[row * c.dv];
        if (!attends) {
          CHECK(std::memcmp(x, y, c.dv * sizeof(double)) == 0 && got.lse[row] == expected.lse[row]);
        } else if (std::isnan(bad) && !in_value) {
          CHECK(std::isnan(got.lse[row]));
          for (int d = 0; d < c.dv; ++d) CHECK(std::isnan(x[d]));
        } else if (in_value) {
          CHECK(!std::isfinite(x[3]) && x[2] == y[2] && got.lse[row] == expected.lse[row]);
        }
      }
    }
  }
}

/// Huge scores do not overflow on the way, nor does the lowest number as a bias of a whole row,
/// which leaves the mean; subnormal values are data.
void check_magnitudes(DType dtype) {
  const double huge = dtype == DType::kFloat16 ? 200 : 133120;
  ForwardCall large(
      {.dtype = dtype, .sq = 64, .sk = 64, .d = 64, .dv = 64, .scale = 1, .magnitude = huge},
      seed_of_run);
  for (double x : large.run(1).out) CHECK(std::isfinite(x));
  ForwardCall lowest({.dtype = dtype, .sq = 5, .sk = 90, .d = 16, .dv = 1}, seed_of_run);
  const float bias = -std::numeric_limits<float>::max();
  lowest.p.features.score_mod.bias.data = &bias;
  lowest.p.features.score_mod.bias_is_float32 = true;
  if (dtype != DType::kFloat64) {  // in double the scores still count beside it
    double mean = 0;
    const reference::Head head{lowest.p, 0, 0};
    for (int j = 0; j < 90; ++j) mean += head.v(j, 0) / 90;
    for (double x : lowest.run(1).out) CHECK_NEAR(x, mean, roundoff(dtype));
  }
  if (dtype != DType::kFloat16) {  // q.k beyond 2^128, the score below
    ForwardCall equal({.dtype = dtype, .sq = 30, .sk = 20, .d = 8, .dv = 1}, seed_of_run);
    const ForwardParams& p = equal.p;
    for (int d = 0; d < 8; ++d) {
      for (int i = 0; i < 30; ++i) equal.set(p.q, p.q_layout, 0, 0, i, d, 0x1p63);
      for (int j = 0; j < 20; ++j) equal.set(p.k, p.k_layout, 0, 0, j, d, 0x1p63);
    }
    double mean = 0, largest = 0;
    const reference::Head head{p, 0, 0};
    for (int j = 0; j < 20; ++j) mean += head.v(j, 0) / 20;
    for (int j = 0; j < 20; ++j) largest = std::fmax(largest, std::fabs(head.v(j, 0)));
    for (double x : equal.run(1).out)
      CHECK_NEAR(x, mean, roundoff(dtype) * std::fabs(mean) + 0x1p-20 * largest);
  }
  if (dtype != DType::kFloat16) {  // the same with scales that take q.k below 2^128, or to 0
    for (double scale : {0.0, 1e-12, -1e-12, 1e-38}) {
      ForwardCase c{.dtype = dtype, .sq = 30, .sk = 20, .d = 1, .dv = 3, .scale = scale};
      ForwardCall equal(c, seed_of_run);
      const double value = scale == 1e-38 ? 0x1p125 : 0x1p80;
      for (int i = 0; i < c.sq; ++i) equal.set(equal.p.q, equal.p.q_layout, 0, 0, i, 0, value);
      for (int j = 0; j < c.sk; ++j) equal.set(equal.p.k, equal.p.k_layout, 0, 0, j, 0, value);
      const reference::Result got = equal.run(1);
      const reference::Head head{equal.p, 0, 0};
      for (int i = 0; i < c.sq; ++i) {
        CHECK(std::isfinite(got.lse[i]));
        for (int d = 0; d < c.dv; ++d) {
          double mean = 0, largest = 0;
          for (int j = 0; j < c.sk; ++j) mean += head.v(j, d) / c.sk;
          for (int j = 0; j < c.sk; ++j) largest = std::fmax(largest, std::fabs(head.v(j, d)));
          CHECK_NEAR(got.out[i * c.dv + d], mean,
                     roundoff(dtype) * std::fabs(mean) + 0x1p-20 * largest + weight_error(equal.p));
        }
      }
    }
  }
  if (dtype != DType::kFloat32) return;
  ForwardCall tiny({.sq = 50, .sk = 80, .d = 32, .dv = 32}, seed_of_run);
  for (int j = 0; j < 80; ++j) {
    for (int d = 0; d < 32; ++d) {
      tiny.set(tiny.p.v, tiny.p.k_layout, 0, 0, j, d, (j % 7 - 3) * 1e-40);
    }
  }
  const reference::Result expected = reference::forward(tiny.p), got = tiny.run(1);
  for (size_t i = 0; i < got.out.size(); ++i) CHECK_NEAR(got.out[i], expected.out[i], 1e-43);
}

/// All of it for one dtype.
void check_dtype(DType dtype, std::mt19937_64& generator) {
  for (int i = 0; i < 150; ++i) {
    ForwardCase c = random_case(generator);
    c.dtype = dtype;
    check_case(c, seed_of_run + i);
  }
  check_repeatable(dtype);
  check_neutral_features(dtype);
  check_few_keys(dtype);
  for (Drop drop : {Drop::kCausal, Drop::kBoolMask, Drop::kBias}) check_poison(dtype, drop);
  check_magnitudes(dtype);
  for (int d : {128, 256, 512}) {
    check_case({.dtype = dtype, .heads = 2, .sq = 50, .sk = 70, .d = d, .dv = d, .scale = 0.05},
               seed_of_run);
  }
}

}  // namespace
}  // namespace flash
