// SPDX-License-Identifier: BSD-3-Clause
// Philox against its published known-answer vectors; the keep decision against its definition.
#include "attention/dropout.h"

#include <cmath>
#include <initializer_list>

#include "check.h"

using flash::Dropout;
using flash::DropoutStream;
using flash::philox4x32;
using flash::PhiloxBlock;

namespace {

struct KnownAnswer {
  PhiloxBlock counter;
  uint32_t key[2];
  PhiloxBlock after_7_rounds, after_10_rounds;
};

/// kat_vectors of the Random123 distribution: all zeros, all ones, digits of pi.
constexpr KnownAnswer kKnownAnswers[] = {
    {{{0, 0, 0, 0}},
     {0, 0},
     {{0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48}},
     {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
    {{{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
     {0xffffffff, 0xffffffff},
     {{0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662}},
     {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
    {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
     {0xa4093822, 0x299f31d0},
     {{0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a}},
     {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
};

bool equal(const PhiloxBlock& a, const PhiloxBlock& b) {
  return a.x[0] == b.x[0] && a.x[1] == b.x[1] && a.x[2] == b.x[2] && a.x[3] == b.x[3];
}

void check_known_answers() {
  for (const KnownAnswer& known : kKnownAnswers) {
    CHECK(equal(philox4x32<7>(known.counter, known.key[0], known.key[1]), known.after_7_rounds));
    CHECK(equal(philox4x32<10>(known.counter, known.key[0], known.key[1]), known.after_10_rounds));
  }
}

DropoutStream stream(int64_t seed, int64_t offset, int b, int h, int num_heads, double p) {
  const int64_t rng_state[2] = {seed, offset};
  Dropout dropout;
  dropout.rng_state = rng_state;
  dropout.threshold = uint32_t(std::lround((1 - p) * 65536));
  return DropoutStream::of(dropout, b, h, num_heads);
}

/// numerics.md, "Dropout bits", written a second time, pair by pair.
bool keep_by_definition(uint64_t seed, uint64_t offset, int b, int h, int num_heads, uint32_t q,
                        uint32_t k, uint32_t threshold) {
  const uint64_t key = seed ^ 0x666C6173685F6174ull;
  const uint64_t low = offset + uint64_t(b) * num_heads + h;
  const uint64_t high = uint64_t(q / 16 * 8 + q % 8) << 32 | (k / 32 * 8 + k % 8);
  const PhiloxBlock bits =
      philox4x32<7>({{uint32_t(low), uint32_t(low >> 32), uint32_t(high), uint32_t(high >> 32)}},
                    uint32_t(key), uint32_t(key >> 32));
  const uint32_t e = 4 * (q % 16 / 8) + k % 32 / 8;
  return (bits.x[e / 2] >> (16 * (e % 2)) & 0xffff) < threshold;
}

void check_definition() {
  for (int64_t offset : {int64_t(0), int64_t(4), int64_t(0xffffffff), int64_t(1) << 40}) {
    for (int b : {0, 1, 5}) {
      for (int h : {0, 2}) {
        const DropoutStream s = stream(-77, offset, b, h, 3, 0.3);
        for (int q = 0; q < 50; ++q) {
          for (int k = 0; k < 70; ++k) {
            CHECK(s.keep(q, k) ==
                  keep_by_definition(uint64_t(-77), uint64_t(offset), b, h, 3, q, k, s.threshold));
          }
        }
      }
    }
  }
  const DropoutStream far = stream(1, 0, 0, 0, 1, 0.5);
  const int large = (1 << 30) + 5;
  CHECK(far.keep(large, large) == keep_by_definition(1, 0, 0, 0, 1, large, large, far.threshold));
}

/// One call for an aligned 16 x 32 block gives the bits of one call per pair, whichever of its
/// members asks.
void check_block_form() {
  const DropoutStream s = stream(12345, 8, 1, 1, 4, 0.4);
  for (int q0 = 0; q0 < 64; q0 += 16) {
    for (int k0 = 0; k0 < 128; k0 += 32) {
      for (int q = 0; q < 8; ++q) {
        for (int k = 0; k < 8; ++k) {
          const PhiloxBlock block = s.block(q0 + q, k0 + k);
          for (int row = 0; row < 2; ++row) {
            for (int column = 0; column < 4; ++column) {
              const int member_q = q0 + q + 8 * row, member_k = k0 + k + 8 * column;
              CHECK(equal(s.block(member_q, member_k), block));
              CHECK(s.keeps(block, row, column) == s.keep(member_q, member_k));
            }
          }
        }
      }
    }
  }
}

double keep_fraction(const DropoutStream& s, int size) {
  long kept = 0;
  for (int q = 0; q < size; ++q) {
    for (int k = 0; k < size; ++k) kept += s.keep(q, k);
  }
  return double(kept) / size / size;
}

void check_keep_fraction() {
  const int size = 512;
  for (double p : {0.0, 0.1, 0.5, 0.77, 1.0}) {
    for (int h = 0; h < 3; ++h) {
      const double deviation = std::sqrt(p * (1 - p)) / size;
      CHECK_NEAR(keep_fraction(stream(99, 0, 0, h, 3, p), size), 1 - p, 5 * deviation + 1e-5);
    }
  }
  CHECK(stream(0, 0, 0, 0, 1, 1e-30).threshold == 65536);
  CHECK(keep_fraction(stream(3, 0, 0, 0, 1, 1e-30), 64) == 1);
  CHECK(keep_fraction(stream(3, 0, 0, 0, 1, 1), 64) == 0);
}

/// Two sets of decisions agree on p^2 + (1 - p)^2 of the pairs when they are independent: other
/// heads, sequences, seeds, offsets, and other tiles of the same head.
void check_independence() {
  const int size = 512;
  const double p = 0.4, expected = p * p + (1 - p) * (1 - p);
  const double bound = 5 * std::sqrt(expected * (1 - expected)) / size;
  const DropoutStream base = stream(7, 0, 0, 0, 2, p);
  struct Other {
    DropoutStream s;
    int shift_q, shift_k;
  };
  for (const Other& other :
       {Other{stream(7, 0, 0, 1, 2, p), 0, 0}, Other{stream(7, 0, 1, 0, 2, p), 0, 0},
        Other{stream(8, 0, 0, 0, 2, p), 0, 0}, Other{stream(7, 4, 0, 0, 2, p), 0, 0},
        Other{base, 1, 0}, Other{base, 0, 1}, Other{base, 8, 0}, Other{base, 0, 8},
        Other{base, 16, 0}, Other{base, 0, 32}, Other{base, 512, 512}}) {
    long agree = 0;
    for (int q = 0; q < size; ++q) {
      for (int k = 0; k < size; ++k)
        agree += base.keep(q, k) == other.s.keep(q + other.shift_q, k + other.shift_k);
    }
    CHECK_NEAR(double(agree) / size / size, expected, bound);
  }
}

}  // namespace

int main() {
  check_known_answers();
  check_definition();
  check_block_form();
  check_keep_fraction();
  check_independence();
  std::printf("dropout_test: ok\n");
}
