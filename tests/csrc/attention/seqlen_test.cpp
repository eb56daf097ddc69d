// SPDX-License-Identifier: BSD-3-Clause
// Where sequences lie: dense, packed, cut short; and that no value a caller can put on the device
// leads outside the tensor.
#include "attention/seqlen.h"

#include <initializer_list>
#include <limits>

#include "attention/params.h"
#include "check.h"

using flash::Sequence;
using flash::SequenceLayout;

namespace {

constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
constexpr int32_t kLeast = std::numeric_limits<int32_t>::min();

void check_dense() {
  const SequenceLayout layout{.max = 7};
  CHECK(!layout.packed());
  for (int b = 0; b < 3; ++b) {
    const Sequence s = Sequence::of(layout, b);
    CHECK(s.first_row == 0 && s.batch_index == b && s.length == 7);
  }
  const int32_t seqused[5] = {0, 3, 7, 9, -1};
  const SequenceLayout cut{.max = 7, .seqused = seqused};
  const int expected[5] = {0, 3, 7, 7, 0};
  for (int b = 0; b < 5; ++b) CHECK(Sequence::of(cut, b).length == expected[b]);
}

void check_packed() {
  const int32_t cu_seqlens[5] = {0, 4, 4, 10, 12};
  const SequenceLayout layout{.max = 6, .total = 15, .cu_seqlens = cu_seqlens};
  CHECK(layout.packed());
  for (int b = 0; b < 4; ++b) {
    const Sequence s = Sequence::of(layout, b);
    CHECK(s.first_row == cu_seqlens[b] && s.batch_index == 0);
    CHECK(s.length == cu_seqlens[b + 1] - cu_seqlens[b]);
  }
  const int32_t seqused[4] = {2, 1, 100, -5};
  const SequenceLayout cut{.max = 6, .total = 15, .cu_seqlens = cu_seqlens, .seqused = seqused};
  const int expected[4] = {2, 0, 6, 0};
  for (int b = 0; b < 4; ++b) {
    CHECK(Sequence::of(cut, b).length == expected[b]);
    CHECK(Sequence::of(cut, b).first_row == cu_seqlens[b]);
  }
  const SequenceLayout short_max{.max = 3, .total = 15, .cu_seqlens = cu_seqlens};
  CHECK(Sequence::of(short_max, 0).length == 3 && Sequence::of(short_max, 3).length == 2);
}

/// Whatever stands in cu_seqlens and seqused, [first_row, first_row + length) lies in the tensor.
void check_every_value_is_safe() {
  const int32_t values[] = {kLeast, -7, -1, 0, 1, 5, 9, 10, 11, 1000, kMost};
  for (int32_t begin : values) {
    for (int32_t end : values) {
      for (int32_t used : values) {
        for (int max : {0, 4, 10, 50}) {
          for (int64_t total : {0, 10}) {
            const int32_t cu_seqlens[2] = {begin, end};
            const SequenceLayout layout{
                .max = max, .total = total, .cu_seqlens = cu_seqlens, .seqused = &used};
            const Sequence s = Sequence::of(layout, 0);
            CHECK(s.length >= 0 && s.length <= max);
            CHECK(s.first_row >= 0 && s.first_row + s.length <= total);
            const bool in_range = begin >= 0 && end >= begin && end <= total &&
                                  end - begin <= max && used >= end - begin;
            CHECK(!in_range || (s.first_row == begin && s.length == end - begin));
          }
        }
      }
    }
  }
}

void check_offsets() {
  const int64_t large = int64_t(1) << 34;
  const flash::TensorView view{nullptr, large, 128, 7};
  CHECK(view.offset({.first_row = 0, .batch_index = 3, .length = 5}, 2) == 3 * large + 256);
  const int64_t row = int64_t(1) << 31;
  CHECK(view.offset({.first_row = row, .batch_index = 0, .length = 5}, 1) == 128 + 7 * row);
  const flash::RowView rows{nullptr, 40, 10};
  CHECK(rows.offset({.first_row = 6, .batch_index = 0, .length = 5}, 3) == 36);
  CHECK(rows.offset({.first_row = 0, .batch_index = 2, .length = 5}, 1) == 90);
}

}  // namespace

int main() {
  check_dense();
  check_packed();
  check_every_value_is_safe();
  check_offsets();
  std::printf("seqlen_test: ok\n");
}
