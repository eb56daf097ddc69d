// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "problem.h"

namespace flash {

/// Each feature alone, the awkward shapes, and random mixtures; every one in all dtypes that
/// `backend_dtypes` lists.
inline std::vector<Case> make_cases(const std::vector<DType>& dtypes, int num_random,
                                    uint64_t seed) {
  std::vector<Case> plain;
  const auto add = [&](std::string name, auto&& change) {
    Case c;
    c.name = std::move(name);
    change(c);
    plain.push_back(c);
  };
  constexpr int kNone = IntervalMask::kUnbounded;
  add("plain", [](Case&) {});
  add("one pair", [](Case& c) { c.sq = c.sk = c.d = c.dv = 1; });
  add("no keys", [](Case& c) { c.sk = 0; });
  add("no queries", [](Case& c) { c.sq = 0; });
  add("tile multiples", [](Case& c) { c.sq = 256, c.sk = 256, c.d = c.dv = 64; });
  add("one beyond a tile", [](Case& c) { c.sq = 129, c.sk = 129, c.d = c.dv = 65; });
  for (int d : {8, 33, 72, 96, 128, 160, 192, 256, 320, 512})
    add("d" + std::to_string(d), [&](Case& c) {
      c.d = c.dv = d, c.heads = 2, c.scale = 0.1;
      c.gap = d % 16 ? 0 : 8;
    });
  add("d64 dv128", [](Case& c) { c.d = 64, c.dv = 128; });
  add("d192 dv128", [](Case& c) { c.d = 192, c.dv = 128; });
  add("d40 dv24", [](Case& c) { c.d = 40, c.dv = 24, c.gap = 3; });
  add("causal", [](Case& c) { c.sq = c.sk = 200, c.mask.window_right = 0; });
  add("causal top-left, more queries", [](Case& c) { c.sq = 190, c.mask.window_right = 0; });
  add("causal bottom-right, empty rows",
      [](Case& c) { c.sq = 300, c.sk = 150, c.mask.window_right = 0, c.mask.bottom_right = true; });
  add("window", [](Case& c) { c.sq = 300, c.sk = 280, c.mask = {true, 40, 10, 0}; });
  add("window without a diagonal", [](Case& c) { c.sk = 300, c.mask = {false, -100, 150, 0}; });
  add("prefix", [](Case& c) { c.sq = c.sk = 260, c.mask = {false, kNone, 0, 70}; });
  add("multi-query", [](Case& c) { c.heads = 6, c.heads_k = 1; });
  add("rows first", [](Case& c) { c.rows_first = true, c.gap = 4; });
  add("packed", [](Case& c) { c.packed = true, c.batch = 4, c.sq = 150, c.sk = 170; });
  add("packed causal", [](Case& c) {
    c.packed = true, c.batch = 5, c.sq = 150, c.sk = 140, c.mask.window_right = 0;
    c.mask.bottom_right = true, c.rows_first = true;
  });
  add("seqused", [](Case& c) { c.seqused = true, c.batch = 4, c.sq = 150, c.sk = 140; });
  add("packed seqused", [](Case& c) { c.packed = c.seqused = true, c.batch = 4; });
  add("negative scale", [](Case& c) { c.scale = -0.3; });
  add("zero scale", [](Case& c) { c.scale = 0; });
  add("softcap", [](Case& c) { c.softcap = 1.5; });
  add("bool mask", [](Case& c) { c.bool_mask = true; });
  add("key padding",
      [](Case& c) { c.bool_mask = true, c.broadcast = 2 | 4, c.masked_keys_are_nan = true; });
  for (int broadcast = 0; broadcast < 16; ++broadcast)
    add("bias broadcast " + std::to_string(broadcast), [&](Case& c) {
      c.bias = true, c.broadcast = broadcast, c.bias_is_float32 = broadcast % 3 == 0;
      c.sq = 150, c.sk = 140;
    });
  add("alibi", [](Case& c) { c.alibi = true, c.sq = 150; });
  add("alibi per batch", [](Case& c) { c.alibi = c.slopes_per_batch = true, c.batch = 3; });
  add("sink", [](Case& c) { c.sink = true; });
  add("sink, empty rows", [](Case& c) {
    c.sink = true, c.sq = 200, c.mask.window_right = 0, c.mask.bottom_right = true;
  });
  add("dlse", [](Case& c) { c.dlse = true; });
  add("dlse, empty rows", [](Case& c) {
    c.dlse = true, c.sq = 200, c.mask.window_right = 0, c.mask.bottom_right = true;
  });
  add("dropout", [](Case& c) { c.dropout_p = 0.3, c.sq = 150, c.sk = 170; });
  add("dropout of everything", [](Case& c) { c.dropout_p = 1; });
  for (int unwanted = 1; unwanted < 8; ++unwanted)
    add("unwanted " + std::to_string(unwanted), [&](Case& c) { c.unwanted = unwanted; });

  std::mt19937_64 random(seed);
  const auto below = [&](int n) { return int(random() % uint64_t(n)); };
  const int dims[] = {16, 32, 48, 64, 80, 96, 100, 128, 136, 192, 256, 7};
  for (int i = 0; i < num_random; ++i)
    add("random " + std::to_string(i), [&](Case& c) {
      c.batch = 1 + below(3), c.heads_k = 1 + below(2), c.heads = c.heads_k * (1 + below(3));
      c.sq = 1 + below(below(2) ? 40 : 300), c.sk = 1 + below(below(2) ? 40 : 300);
      c.d = c.dv = dims[below(12)];
      if (below(4) == 0) c.dv = dims[below(12)];
      c.scale = below(8) ? 0.15 : -0.15;
      c.mask.bottom_right = below(2);
      if (below(2)) c.mask.window_right = below(2) ? 0 : below(100);
      if (below(3) == 0) c.mask.window_left = below(150);
      if (below(5) == 0) c.mask.prefix = below(100);
      c.rows_first = below(2), c.gap = below(2) ? 0 : below(2) ? 8 : 3;
      c.packed = below(4) == 0, c.seqused = below(6) == 0;
      c.dlse = below(3) == 0;
      if (below(2)) return;
      c.softcap = below(4) ? 0 : 2;
      c.bias = below(3) == 0, c.bias_is_float32 = below(2), c.bool_mask = below(4) == 0;
      c.broadcast = below(16);
      c.alibi = below(4) == 0, c.slopes_per_batch = below(2), c.sink = below(4) == 0;
      c.dropout_p = below(3) ? 0 : 0.25;
    });

  std::vector<Case> cases;
  for (const Case& c : plain)
    for (DType dtype : dtypes) {
      cases.push_back(c);
      cases.back().dtype = dtype;
    }
  return cases;
}

}  // namespace flash
