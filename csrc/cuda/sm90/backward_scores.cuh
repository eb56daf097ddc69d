// SPDX-License-Identifier: BSD-3-Clause
// What the general variant of the backward does to the scores, weights and gradients of a
// warpgroup: 64 rows x kColumns in the layout of wgmma's accumulator, rows = keys or queries.
// Scores are in units of 1; lse is that of the forward, +inf where a row keeps nothing.
//   S = modified(scale q.k),  P = exp(S - lse), negative where dropout drops the pair
//   dV += max(P, 0)^T dO / (1 - p)
//   dS = |P| o (keep / (1 - p) dP - delta);  dbias = dS;  dQ, dK through dS o slope
#pragma once

#include "cuda/common/score_block.cuh"
#include "cuda/sm90/staged_pairs.cuh"
#include "primitives/ptx/shared_memory.cuh"

namespace flash::cuda::sm90 {

/// A number of each query, such as lse, for the accumulators 4 j ... 4 j + 3: of its columns in
/// shared memory (`first`: those of the whole tile), or of its two rows.
struct ColumnValues {
  uint32_t at;

  FLASH_DEVICE explicit ColumnValues(const float* first)
      : at(shared_address(first) + threadIdx.x % 4 * 8) {}
  FLASH_DEVICE float4 operator()(int j) const {
    const float2 v = ptx::load_shared_v2(at + j * 32);
    return {v.x, v.y, v.x, v.y};
  }
};
struct RowValues {
  const float (&row)[2];

  FLASH_DEVICE float4 operator()(int) const { return {row[0], row[0], row[1], row[1]}; }
};

/// The hooks of one sequence and query head. `row` and `column` are the first of this thread;
/// its accumulator 4 j + 2 r + c lies at row + 8 r, column + 8 j + c.
template <class Traits, BlockRows kRows>
struct BackwardScores {
  using Element = typename Traits::Element;
  using Staged = StagedPairs<Traits::kBlockM, Traits::kBlockN, kRows>;

  const ForwardParams& p;
  int batch, head, seqlen_q, seqlen_k;

  FLASH_DEVICE void begin_head(int batch_, int head_, const Sequence& q, const Sequence& k) {
    batch = to_uniform(batch_), head = to_uniform(head_);
    seqlen_q = to_uniform(q.length), seqlen_k = to_uniform(k.length);
  }
  FLASH_DEVICE float scale() const { return static_cast<float>(p.softmax_scale); }
  /// Whether scores are more than products times a positive scale.
  FLASH_DEVICE bool is_modified() const {
    return p.features.score_mod.enabled() || __double_as_longlong(p.softmax_scale) <= 0;
  }
  FLASH_DEVICE bool has_slopes() const { return p.features.score_mod.has_softcap(); }
  FLASH_DEVICE bool has_dropout() const { return p.features.dropout.enabled(); }
  FLASH_DEVICE float dropout_scale() const {
    return has_dropout() ? static_cast<float>(p.features.dropout.scale) : 1.f;
  }

  /// q.k becomes the score. `staged` is at the first row and column of the tile. If has_slopes():
  /// f(j, slopes) for every 32 columns, d(score) / d(scale q.k) of accumulators 16 j ... 16 j + 15
  /// as fp16.
  template <int kCount, class F>
  FLASH_DEVICE void modify(float (&acc)[kCount], int row, int column, Staged staged, F&& f) const {
    static_assert(kCount % ScoreBlock::kCount == 0, "a block of scores spans 32 columns");
    if (is_only_staged(staged)) return modify_by_tile(acc, staged);
#pragma unroll
    for (int j = 0; j < kCount; j += ScoreBlock::kCount) {
      auto scores = ScoreBlock::of([&](int i) { return acc[j + i] * scale(); });
      if (has_slopes()) {
        const ScoreMod& mod = p.features.score_mod;
        const auto capped = softcap_score(scores, static_cast<float>(mod.softcap));
        uint32_t slopes[ScoreBlock::kCount / 2];
#pragma unroll
        for (int i = 0; i < ScoreBlock::kCount / 2; ++i)
          slopes[i] = pack<__half>(capped.slope.x[2 * i], capped.slope.x[2 * i + 1]);
        f(j / ScoreBlock::kCount, slopes);
        scores = capped.score;
      }
      const BlockPlace<Element, kRows, Staged> place{p,        batch, head,           seqlen_q,
                                                     seqlen_k, row,   column + 2 * j, staged};
      scores = p.features.score_mod.template shifted<float>(scores, place);
#pragma unroll
      for (int i = 0; i < ScoreBlock::kCount; ++i) acc[j + i] = scores.x[i];
      staged.column += ScoreBlock::kColumns;
    }
  }

  /// The usual modifications, a tile of a bias or a mask and nothing else. modify() jumps over what
  /// a call lacks, block by block, and waits for instructions at every jump.
  FLASH_DEVICE bool is_only_staged(const Staged& staged) const {
    const ScoreMod& mod = p.features.score_mod;
    const bool has_one = staged.has_bias() ? !mod.mask.data : staged.has_mask() && !mod.bias.data;
    return has_one && !has_slopes() && !mod.alibi_slopes;
  }
  template <int kCount>
  FLASH_DEVICE void modify_by_tile(float (&acc)[kCount], Staged staged) const {
    const auto for_each_block = [&](auto&& f) {
#pragma unroll
      for (int j = 0; j < kCount; j += ScoreBlock::kCount) {
        f(reinterpret_cast<float (&)[ScoreBlock::kCount]>(acc[j]));
        staged.column += ScoreBlock::kColumns;
      }
    };
    if (staged.has_bias()) {
      for_each_block([&](float (&x)[ScoreBlock::kCount]) {
        const ScoreBlock bias = staged.template bias<Element>();
#pragma unroll
        for (int i = 0; i < ScoreBlock::kCount; ++i) x[i] = fmaf(x[i], scale(), bias.x[i]);
      });
    } else {
      for_each_block([&](float (&x)[ScoreBlock::kCount]) {
        const uint32_t kept = staged.kept();
#pragma unroll
        for (int i = 0; i < ScoreBlock::kCount; ++i)
          x[i] = kept >> kept_bit(i) & 1 ? x[i] * scale() : -INFINITY;
      });
    }
  }

  /// The same; the slopes stay in registers.
  template <int kCount>
  FLASH_DEVICE void modify(float (&acc)[kCount], int row, int column, Staged staged,
                           uint32_t (&slopes)[kCount / 2]) const {
    modify(acc, row, column, staged, [&](int j, const uint32_t (&of_block)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) slopes[8 * j + i] = of_block[i];
    });
  }

  /// exp(s - lse); at most 1, also for a huge score that is recomputed an ulp higher.
  FLASH_DEVICE static float weight(float s, float lse, float unit = 1.f) {
    return exp2_approx(min_or_nan(fmaf(s, unit, -lse), 0.f) * 1.4426950408889634f);
  }
  /// P in place of S.
  template <int kCount, class Values>
  FLASH_DEVICE static void weights(float (&accS)[kCount], const Values& lse) {
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      const float4 l = lse(j);
      const float of_row[4] = {l.x, l.y, l.z, l.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) accS[4 * j + i] = weight(accS[4 * j + i], of_row[i]);
    }
  }
  /// P = exp(unit S - lse) in 16 bits. The unit of products that are no scores yet is scale().
  template <int kCount, class Values>
  FLASH_DEVICE static void weights(uint32_t (&rP)[kCount / 2], const float (&accS)[kCount],
                                   const Values& lse, float unit = 1.f) {
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      const float4 l = lse(j);
      rP[2 * j] = pack<Element>(weight(accS[4 * j], l.x, unit), weight(accS[4 * j + 1], l.y, unit));
      rP[2 * j + 1] =
          pack<Element>(weight(accS[4 * j + 2], l.z, unit), weight(accS[4 * j + 3], l.w, unit));
    }
  }

  /// f(i, c) for the dropped ones of accumulators 2 i + c. Rows = keys: half of a Philox call
  /// serves two rows and two tiles of 8 columns; rows = queries: all of it serves two rows and four
  /// tiles.
  template <int kPairs, class F>
  FLASH_DEVICE void for_each_dropped(int row, int column, F&& f) const {
    const auto stream = DropoutStream::of(p.features.dropout, batch, head, p.num_heads);
    constexpr bool kIsTransposed = kRows == BlockRows::kKeys;
    constexpr int kServed = kIsTransposed ? 4 : 8;  // of rP
#pragma unroll
    for (int j = 0; j < kPairs; j += kServed)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int other = column + 4 * j + c;
        PhiloxBlock bits = kIsTransposed ? stream.block(other, row) : stream.block(row, other);
        if (kIsTransposed) {  // constant indices below
          const bool is_upper = row % 32 >= 16;
          bits = {{is_upper ? bits.x[1] : bits.x[0], 0, is_upper ? bits.x[3] : bits.x[2], 0}};
        }
#pragma unroll
        for (int i = 0; i < kServed; ++i) {
          const int query = kIsTransposed ? i / 2 : i % 2, key = kIsTransposed ? i % 2 : i / 2;
          if (!stream.keeps(bits, query, key)) f(j + i, c);
        }
      }
  }
  /// Sets the sign of dropped weights.
  template <int kCount>
  FLASH_DEVICE void mark_dropped(uint32_t (&rP)[kCount], int row, int column) const {
    for_each_dropped<kCount>(row, column, [&](int i, int c) { rP[i] |= 0x8000u << 16 * c; });
  }
  template <int kCount>
  FLASH_DEVICE void mark_dropped(float (&accP)[kCount], int row, int column) const {
    for_each_dropped<kCount / 2>(row, column, [&](int i, int c) {
      accP[2 * i + c] = __int_as_float(__float_as_int(accP[2 * i + c]) | 0x80000000);
    });
  }
  /// Marked weights become 0.
  template <int kCount>
  FLASH_DEVICE static void drop_marked(uint32_t (&rP)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) rP[i] = positive_part<Element>(rP[i]);
  }

  /// The value, or 0 where the weight is. Not by "?": the compiler would branch round the value,
  /// and serialise the products of wgmma (C7511).
  FLASH_DEVICE static float unless_zero(float weight, float value) {
    asm("{ .reg .pred p; setp.eq.f32 p, %1, 0f00000000; selp.f32 %0, 0f00000000, %0, p; }"
        : "+f"(value)
        : "f"(weight));
    return value;
  }
  /// dS in place of dP; 0 where P is. kIsClean: dP is finite there, because K and V are zeros where
  /// nobody attends; asking costs 4 to 6 % of the fused kernel.
  template <bool kIsClean = false, int kCount, class Values>
  FLASH_DEVICE void gradient(const uint32_t (&rP)[kCount / 2], float (&accdP)[kCount],
                             const Values& delta) const {
    if (has_dropout()) {
      const float scale = static_cast<float>(p.features.dropout.scale);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const bool is_dropped = rP[i / 2] & 0x8000u << i % 2 * 16;
        accdP[i] = is_dropped ? 0.f : accdP[i] * scale;
      }
    }
    const auto value = [](float weight, float dp, float d) {
      const float ds = fabsf(weight) * (dp - d);
      return kIsClean ? ds : unless_zero(weight, ds);
    };
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      const float4 d = delta(j);
      const float2 low = unpack<Element>(rP[2 * j]), high = unpack<Element>(rP[2 * j + 1]);
      accdP[4 * j] = value(low.x, accdP[4 * j], d.x);
      accdP[4 * j + 1] = value(low.y, accdP[4 * j + 1], d.y);
      accdP[4 * j + 2] = value(high.x, accdP[4 * j + 2], d.z);
      accdP[4 * j + 3] = value(high.y, accdP[4 * j + 3], d.w);
    }
  }
  /// sums += dS, from weights in fp32.
  template <bool kIsClean, int kCount, class Values>
  FLASH_DEVICE void add_gradient(float (&sums)[kCount], const float (&accP)[kCount],
                                 float (&accdP)[kCount], const Values& delta) const {
    if (has_dropout()) {
      const float scale = dropout_scale();
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        accdP[i] = __float_as_int(accP[i]) < 0 ? 0.f : accdP[i] * scale;
    }
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      const float4 d = delta(j);
      const float of_row[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
      for (int i = 4 * j; i < 4 * j + 4; ++i) {
        const float dp = accdP[i] - of_row[i % 4], weight = fabsf(accP[i]);
        sums[i] = fmaf(weight, kIsClean ? dp : unless_zero(weight, dp), sums[i]);
      }
    }
  }
  /// Two weights times their slopes: dS is linear in P. The slope of a masked pair may be NaN.
  FLASH_DEVICE static uint32_t scaled(uint32_t weights, uint32_t slopes) {
    const float2 weight = unpack<Element>(weights), slope = unpack<__half>(slopes);
    return pack<Element>(unless_zero(weight.x, weight.x * slope.x),
                         unless_zero(weight.y, weight.y * slope.y));
  }
  /// dL/d(score) -> dL/d(scale q.k), by the slopes of modify().
  template <int kCount>
  FLASH_DEVICE static void through_slopes(float (&accdS)[kCount],
                                          const uint32_t (&slopes)[kCount / 2]) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float2 slope = unpack<__half>(slopes[i]);
      accdS[2 * i] *= slope.x;
      accdS[2 * i + 1] *= slope.y;
    }
  }
};

}  // namespace flash::cuda::sm90
