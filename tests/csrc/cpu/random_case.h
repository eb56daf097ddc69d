// SPDX-License-Identifier: BSD-3-Clause
// What the tests of the CPU backend share: random cases, roundoff, comparison of bits.
#pragma once

#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/forward_case.h"

namespace flash {

inline constexpr int kUnbounded = IntervalMask::kUnbounded;
inline constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16,
                                    DType::kFloat16};

/// Unit roundoff: of a result's dtype, of an accumulation's.
inline double roundoff(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return 0x1p-8;
    case DType::kFloat16:
      return 0x1p-11;
    case DType::kFloat32:
      return 0x1p-24;
    case DType::kFloat64:
      return 0x1p-53;
  }
  return 0;
}

inline bool same_bits(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

inline void print(const ForwardCase& c, uint64_t seed) {
  std::fprintf(stderr,
               "%s dtype %d b %d h %d/%d sq %d sk %d d %d dv %d scale %g mask %d %d %d %d packed "
               "%d seqused %d softcap %g bias %d (fp32 %d) mask %d broadcast %d alibi %d sink %d "
               "dropout %g; seed %llu\n",
               cpu::current_isa(), int(c.dtype), c.batch, c.heads, c.heads_k, c.sq, c.sk, c.d, c.dv,
               c.scale, c.mask.bottom_right, c.mask.window_left, c.mask.window_right, c.mask.prefix,
               c.packed, c.seqused, c.softcap, c.bias, c.bias_is_float32, c.bool_mask, c.broadcast,
               c.alibi, c.sink, c.dropout_p, (unsigned long long)seed);
}

struct Choice {
  std::mt19937_64& generator;
  template <class T>
  T operator()(std::initializer_list<T> values) {
    return values.begin()[generator() % values.size()];
  }
  bool one_in(int n) { return generator() % n == 0; }
};

/// Any combination of features, half of the time.
inline void add_features(ForwardCase& c, Choice& choose) {
  if (choose.one_in(2)) return;
  if (choose.one_in(3)) c.softcap = choose({1.5, 30.0});
  c.bias = choose.one_in(2);
  c.bias_is_float32 = choose.one_in(2);
  c.bool_mask = choose.one_in(3);
  c.broadcast = int(choose.generator() % 16);
  c.alibi = choose.one_in(3);
  c.sink = choose.one_in(3);
  if (choose.one_in(2)) c.dropout_p = choose({0.1, 0.5, 0.9, 1.0});
}

/// Sizes round the edges of groups, blocks and panels; any mask, layout and features.
inline ForwardCase random_case(std::mt19937_64& generator) {
  Choice choose{generator};
  ForwardCase c;
  c.batch = choose({1, 2, 3});
  c.heads_k = choose({1, 2});
  c.heads = c.heads_k * choose({1, 1, 2, 3, 5});
  c.sq = choose({1, 2, 7, 16, 47, 48, 49, 63, 95, 97, 150, 200});
  c.sk = choose({0, 1, 5, 63, 64, 65, 128, 150});
  c.d = choose({1, 3, 8, 16, 40, 64, 80});
  c.dv = choose({1, 5, 8, 17, 64, 72});
  c.scale = choose({0.125, 0.3, -0.2, 0.0});
  c.mask = {choose({false, true}), choose({kUnbounded, kUnbounded, 0, 10, 70}),
            choose({kUnbounded, 0, 0, 3, 50}), choose({0, 0, 0, 20})};
  c.order = choose({Order::kHeadsFirst, Order::kRowsFirst});
  c.packed = choose.one_in(3);
  c.seqused = choose.one_in(4);
  add_features(c, choose);
  return c;
}

}  // namespace flash
