// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "attention/platform.h"

namespace flash {

/// Half-open. Empty ranges are written begin == end.
struct Range {
  int begin, end;
};

/// Loop bounds over blocks: [visit.begin, full.begin) and [full.end, visit.end) need the element
/// mask, the middle does not.
struct BlockRanges {
  Range visit, full;
};

/// One interval of keys per query. Query q keeps the keys [key_begin(q), key_end(q)):
///
///   key_begin(q) = q < open ? 0 : max(0, q + lower)
///   key_end(q)   = min(seqlen_k, max(q + upper + 1, floor))
///
/// No mask, causal, sliding window, prefix-LM and the ragged tail of a sequence are all this one
/// struct. Where the diagonal lies is part of the bounds, so torch's top-left causal and
/// FlashAttention's bottom-right causal differ in a number. Both ends never decrease with q; that
/// is what makes the loop bounds of a block those of its first and last row.
struct IntervalMask {
  static constexpr int kUnbounded = 1 << 29;

  int seqlen_q, seqlen_k;
  int lower = -kUnbounded;  ///< first kept key relative to q
  int upper = kUnbounded;   ///< last kept key relative to q, inclusive
  int floor = 0;  ///< every query keeps at least the keys below `floor` that `lower` allows
  int open = 0;   ///< queries below `open` have no lower bound (the transpose of `floor`)

  /// window_left keys before the diagonal and window_right after it, both inclusive; the diagonal
  /// of query 0 is key diagonal_offset. The first `prefix` keys are visible to every query that the
  /// left window lets see them.
  static FLASH_HOST_DEVICE IntervalMask window(int seqlen_q, int seqlen_k, int diagonal_offset,
                                               int window_left, int window_right, int prefix = 0) {
    IntervalMask mask{seqlen_q, seqlen_k};
    if (window_left < kUnbounded) mask.lower = diagonal_offset - window_left;
    if (window_right < kUnbounded) mask.upper = diagonal_offset + window_right;
    mask.floor = prefix;
    return mask;
  }
  static FLASH_HOST_DEVICE IntervalMask none(int seqlen_q, int seqlen_k) {
    return {seqlen_q, seqlen_k};
  }
  static FLASH_HOST_DEVICE IntervalMask causal_top_left(int seqlen_q, int seqlen_k) {
    return window(seqlen_q, seqlen_k, 0, kUnbounded, 0);
  }
  static FLASH_HOST_DEVICE IntervalMask causal_bottom_right(int seqlen_q, int seqlen_k) {
    return window(seqlen_q, seqlen_k, seqlen_k - seqlen_q, kUnbounded, 0);
  }

  FLASH_HOST_DEVICE int key_begin(int q) const { return q < open ? 0 : larger(q + lower, 0); }
  FLASH_HOST_DEVICE int key_end(int q) const {
    return smaller(larger(q + upper + 1, floor), seqlen_k);
  }
  FLASH_HOST_DEVICE bool keep(int q, int k) const { return k >= key_begin(q) && k < key_end(q); }

  /// Keys that at least one of the rows [q_begin, q_end) may keep.
  FLASH_HOST_DEVICE Range any_keys(int q_begin, int q_end) const {
    return ordered(key_begin(q_begin), key_end(smaller(q_end, seqlen_q) - 1));
  }
  /// Keys that all of the rows [q_begin, q_end) keep.
  FLASH_HOST_DEVICE Range all_keys(int q_begin, int q_end) const {
    return ordered(key_begin(smaller(q_end, seqlen_q) - 1), key_end(q_begin));
  }

  /// Loop bounds of a forward kernel: block m of query rows against blocks of keys.
  template <int kBlockM, int kBlockN>
  FLASH_HOST_DEVICE BlockRanges key_blocks(int m_block) const {
    const Range any = any_keys(m_block * kBlockM, (m_block + 1) * kBlockM);
    const Range all = all_keys(m_block * kBlockM, (m_block + 1) * kBlockM);
    const int visit_begin = any.begin / kBlockN;
    const int visit_end = any.begin < any.end ? ceil_div(any.end, kBlockN) : visit_begin;
    const Range visit{visit_begin, visit_end};
    const int full_begin = clamp(ceil_div(all.begin, kBlockN), visit);
    const int full_end = clamp(all.end / kBlockN, {full_begin, visit.end});
    return {visit, {full_begin, full_end}};
  }

  /// The same mask seen from the keys: rows are keys, columns are queries.
  ///   q >= k - upper  or  k < floor   =>  lower' = -upper, open' = floor
  ///   q <= k - lower  or  q < open    =>  upper' = -lower, floor' = open
  FLASH_HOST_DEVICE IntervalMask transposed() const {
    return {seqlen_k, seqlen_q, -upper, -lower, open, floor};
  }

  /// Loop bounds of a backward kernel: block n of keys against blocks of query rows.
  template <int kBlockM, int kBlockN>
  FLASH_HOST_DEVICE BlockRanges query_blocks(int n_block) const {
    return transposed().template key_blocks<kBlockN, kBlockM>(n_block);
  }

 private:
  static FLASH_HOST_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
  static FLASH_HOST_DEVICE int larger(int a, int b) { return a > b ? a : b; }
  static FLASH_HOST_DEVICE int clamp(int x, Range r) { return smaller(larger(x, r.begin), r.end); }
  static FLASH_HOST_DEVICE int ceil_div(int x, int step) { return (x + step - 1) / step; }
  static FLASH_HOST_DEVICE Range ordered(int begin, int end) {
    end = larger(end, 0);
    return {smaller(begin, end), end};
  }
};

/// The mask of a whole call, before the lengths of one sequence are known.
struct MaskSpec {
  bool bottom_right = false;  ///< diagonal ends at the last key; else starts at the first
  int window_left = IntervalMask::kUnbounded, window_right = IntervalMask::kUnbounded;
  int prefix = 0;

  /// Key on the diagonal of query 0.
  FLASH_HOST_DEVICE int diagonal_offset(int seqlen_q, int seqlen_k) const {
    return bottom_right ? seqlen_k - seqlen_q : 0;
  }
  FLASH_HOST_DEVICE IntervalMask of(int seqlen_q, int seqlen_k) const {
    return IntervalMask::window(seqlen_q, seqlen_k, diagonal_offset(seqlen_q, seqlen_k),
                                window_left, window_right, prefix);
  }
};

}  // namespace flash
