// SPDX-License-Identifier: BSD-3-Clause
// IntervalMask against its definition, on every small case: elements, loop bounds of forward and
// backward, and both directions of each bound: nothing needed is skipped, nothing is visited for
// nothing, nothing is masked for nothing.
#include "attention/mask.h"

#include <initializer_list>

#include "check.h"

using flash::BlockRanges;
using flash::IntervalMask;
using flash::MaskSpec;
using flash::Range;

namespace {

constexpr int kUnbounded = IntervalMask::kUnbounded;
long pairs = 0, blocks = 0;

/// The definition in its own words: the diagonal of query q is key q + diagonal.
struct Definition {
  int seqlen_q, seqlen_k, diagonal, left, right, prefix;

  bool keep(int q, int k) const {
    const bool exists = q >= 0 && q < seqlen_q && k >= 0 && k < seqlen_k;
    const bool after_left = left >= kUnbounded || k >= q + diagonal - left;
    const bool before_right = right >= kUnbounded || k <= q + diagonal + right;
    return exists && after_left && (before_right || k < prefix);
  }
  /// Without gaps between the intervals of neighbouring rows, block ranges can be exact.
  bool has_gaps() const { return left < kUnbounded && right < kUnbounded && left + right < 0; }
  IntervalMask mask() const {
    return IntervalMask::window(seqlen_q, seqlen_k, diagonal, left, right, prefix);
  }
};

struct Survey {
  bool any = false, all = true;
};

void check_ranges(BlockRanges r, int num_blocks, bool exact, auto survey) {
  CHECK(0 <= r.visit.begin && r.visit.begin <= r.visit.end && r.visit.end <= num_blocks);
  CHECK(r.visit.begin <= r.full.begin && r.full.begin <= r.full.end && r.full.end <= r.visit.end);
  for (int block = 0; block < num_blocks; ++block) {
    const Survey kept = survey(block);
    const bool visited = block >= r.visit.begin && block < r.visit.end;
    const bool full = block >= r.full.begin && block < r.full.end;
    CHECK(!kept.any || visited);
    CHECK(!full || kept.all);
    CHECK(!exact || !visited || kept.any);
    CHECK(!exact || !kept.all || full);
    ++blocks;
  }
}

template <int kBlockM, int kBlockN>
void check_blocks(const Definition& def) {
  const IntervalMask mask = def.mask();
  const int m_blocks = (def.seqlen_q + kBlockM - 1) / kBlockM;
  const int n_blocks = (def.seqlen_k + kBlockN - 1) / kBlockN;
  // Rows that do not exist never matter; columns that do not exist make a block "not all kept".
  auto survey = [&](int m, int n, bool columns_are_keys) {
    Survey result;
    for (int q = m * kBlockM; q < (m + 1) * kBlockM; ++q) {
      for (int k = n * kBlockN; k < (n + 1) * kBlockN; ++k) {
        const bool row_exists = columns_are_keys ? q < def.seqlen_q : k < def.seqlen_k;
        if (!row_exists) continue;
        result.any |= def.keep(q, k);
        result.all &= def.keep(q, k);
      }
    }
    return result;
  };
  for (int m = 0; m < m_blocks; ++m) {
    check_ranges(mask.key_blocks<kBlockM, kBlockN>(m), n_blocks, !def.has_gaps(),
                 [&](int n) { return survey(m, n, /*columns_are_keys=*/true); });
  }
  for (int n = 0; n < n_blocks; ++n) {
    check_ranges(mask.query_blocks<kBlockM, kBlockN>(n), m_blocks, !def.has_gaps(),
                 [&](int m) { return survey(m, n, /*columns_are_keys=*/false); });
  }
}

void check_elements(const Definition& def) {
  const IntervalMask mask = def.mask(), transposed = mask.transposed();
  const IntervalMask twice = transposed.transposed();
  for (int q = 0; q < def.seqlen_q; ++q) {
    for (int k = 0; k < def.seqlen_k; ++k) {
      const bool kept = def.keep(q, k);
      CHECK(mask.keep(q, k) == kept);
      CHECK(transposed.keep(k, q) == kept);
      CHECK(twice.keep(q, k) == kept);
      ++pairs;
    }
    CHECK(mask.key_begin(q) >= 0 && mask.key_end(q) <= def.seqlen_k);
    CHECK(q == 0 || mask.key_begin(q) >= mask.key_begin(q - 1));
    CHECK(q == 0 || mask.key_end(q) >= mask.key_end(q - 1));
  }
}

/// any_keys and all_keys over every range of rows.
void check_row_ranges(const Definition& def) {
  const IntervalMask mask = def.mask();
  for (int begin = 0; begin < def.seqlen_q; ++begin) {
    for (int end = begin + 1; end <= def.seqlen_q + 3; ++end) {
      const Range any = mask.any_keys(begin, end), all = mask.all_keys(begin, end);
      CHECK(0 <= any.begin && any.begin <= any.end && any.end <= def.seqlen_k);
      CHECK(0 <= all.begin && all.begin <= all.end && all.end <= def.seqlen_k);
      for (int k = 0; k < def.seqlen_k; ++k) {
        Survey kept;
        for (int q = begin; q < end && q < def.seqlen_q; ++q) {
          kept.any |= def.keep(q, k);
          kept.all &= def.keep(q, k);
        }
        const bool in_any = k >= any.begin && k < any.end, in_all = k >= all.begin && k < all.end;
        CHECK(!kept.any || in_any);
        CHECK(def.has_gaps() || !in_any || kept.any);
        CHECK(in_all == kept.all);
      }
    }
  }
}

void check_tiny_cases() {
  for (int seqlen_q = 0; seqlen_q <= 6; ++seqlen_q) {
    for (int seqlen_k = 0; seqlen_k <= 6; ++seqlen_k) {
      for (int diagonal = -7; diagonal <= 7; ++diagonal) {
        for (int left : {kUnbounded, -2, 0, 1, 3, 9}) {
          for (int right : {kUnbounded, -3, -1, 0, 1, 2, 9}) {
            for (int prefix : {0, 1, 3, 8}) {
              const Definition def{seqlen_q, seqlen_k, diagonal, left, right, prefix};
              check_elements(def);
              check_row_ranges(def);
              check_blocks<1, 1>(def);
              check_blocks<2, 3>(def);
              check_blocks<4, 2>(def);
            }
          }
        }
      }
    }
  }
}

void check_tile_sized_cases() {
  for (int seqlen_q : {1, 3, 16, 33, 64, 65}) {
    for (int seqlen_k : {1, 7, 32, 63, 64, 97}) {
      for (int left : {kUnbounded, 0, 5, 40}) {
        for (int right : {kUnbounded, 0, 3, 50}) {
          for (int diagonal : {0, seqlen_k - seqlen_q, 17, -17}) {
            for (int prefix : {0, 20, 64}) {
              const Definition def{seqlen_q, seqlen_k, diagonal, left, right, prefix};
              check_elements(def);
              check_blocks<16, 32>(def);
              check_blocks<32, 16>(def);
              check_blocks<64, 64>(def);
            }
          }
        }
      }
    }
  }
}

void check_names() {
  CHECK(IntervalMask::none(2, 5).key_end(0) == 5);
  CHECK(IntervalMask::causal_top_left(2, 5).key_end(0) == 1);
  CHECK(IntervalMask::causal_bottom_right(2, 5).key_end(0) == 4);
  const BlockRanges no_key = IntervalMask::causal_bottom_right(64, 16).key_blocks<16, 16>(0);
  CHECK(no_key.visit.begin == no_key.visit.end);
  const MaskSpec everything{};
  CHECK(everything.of(3, 4).keep(0, 3) && everything.of(3, 4).keep(2, 0));
  const MaskSpec window{.bottom_right = true, .window_left = 1, .window_right = 0};
  for (int q = 0; q < 3; ++q) {
    for (int k = 0; k < 5; ++k) {
      CHECK(window.of(3, 5).keep(q, k) == (k >= q + 1 && k <= q + 2));
      CHECK(window.of(5, 3).keep(q + 2, k) == (k < 3 && k >= q - 1 && k <= q));
    }
  }
}

/// Positions near the largest length do not overflow.
void check_long_sequences() {
  const int length = (1 << 28) + 3;
  const IntervalMask causal = IntervalMask::causal_top_left(length, length);
  CHECK(causal.keep(length - 1, length - 1) && !causal.keep(length - 2, length - 1));
  const BlockRanges last = causal.key_blocks<64, 64>((length - 1) / 64);
  CHECK(last.visit.begin == 0 && last.visit.end == (length + 63) / 64);
  CHECK(last.full.end == length / 64);
  const IntervalMask open = IntervalMask::none(length, length);
  CHECK(open.transposed().keep(length - 1, 0) && open.transposed().keep(0, length - 1));
}

}  // namespace

int main() {
  check_names();
  check_tiny_cases();
  check_tile_sized_cases();
  check_long_sequences();
  std::printf("mask_test: %ld pairs, %ld blocks\n", pairs, blocks);
}
