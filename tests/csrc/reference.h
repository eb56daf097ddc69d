// SPDX-License-Identifier: BSD-3-Clause
// The formula in fp64, one pair at a time, on the parameter structs that backends get (host
// pointers). Slow on purpose: what it does can be read beside numerics.md section 1.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "attention/params.h"

namespace flash::reference {

inline double from_half(uint16_t bits) {
  const int sign = bits >> 15, exponent = bits >> 10 & 31, fraction = bits & 1023;
  double value = exponent == 0    ? std::ldexp(fraction, -24)
                 : exponent == 31 ? (fraction ? NAN : INFINITY)
                                  : std::ldexp(1024 + fraction, exponent - 25);
  return sign ? -value : value;
}
inline uint16_t to_half(double x) {
  if (std::isnan(x)) return 0x7e00;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double a = std::fabs(x);
  if (a >= 65520) return sign | 0x7c00;
  int exponent = a == 0 ? -14 : std::ilogb(a);
  if (exponent < -14) exponent = -14;
  const int mantissa = int(std::nearbyint(std::ldexp(a, 10 - exponent)));  // 0 .. 2048
  return sign | uint16_t(mantissa + (exponent + 14) * 1024);
}
inline double from_bfloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }
inline uint16_t to_bfloat16(double x) {
  if (std::isnan(x)) return 0x7fc0;
  const uint32_t bits = std::bit_cast<uint32_t>(float(x));
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline double load(DType dtype, const void* data, int64_t at) {
  switch (dtype) {
    case DType::kFloat16:
      return from_half(static_cast<const uint16_t*>(data)[at]);
    case DType::kBFloat16:
      return from_bfloat16(static_cast<const uint16_t*>(data)[at]);
    case DType::kFloat32:
      return static_cast<const float*>(data)[at];
    case DType::kFloat64:
      return static_cast<const double*>(data)[at];
  }
  return NAN;
}
inline void store(DType dtype, void* data, int64_t at, double x) {
  switch (dtype) {
    case DType::kFloat16:
      static_cast<uint16_t*>(data)[at] = to_half(x);
      break;
    case DType::kBFloat16:
      static_cast<uint16_t*>(data)[at] = to_bfloat16(x);
      break;
    case DType::kFloat32:
      static_cast<float*>(data)[at] = float(x);
      break;
    case DType::kFloat64:
      static_cast<double*>(data)[at] = x;
      break;
  }
}
inline DType accumulation(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

/// Results in fp64, dense (b, h, sq, .) in the index order of the outermost loops; packed calls use
/// the maximum lengths, rows beyond a sequence hold 0 (lse: -inf).
struct Result {
  std::vector<double> out, lse;
};
struct Gradients {
  std::vector<double> dq, dk, dv, dbias, dslopes, dsink;
};

/// One (sequence, head) of a call, with everything that a pair of positions needs.
struct Head {
  const ForwardParams& p;
  int b, h;
  Sequence qs = Sequence::of(p.q_layout, b), ks = Sequence::of(p.k_layout, b);
  int hk = h / p.gqa_ratio();
  IntervalMask mask = p.mask_of(qs, ks);
  int diagonal = p.mask.diagonal_offset(qs.length, ks.length);

  double q(int i, int d) const {
    return load(p.dtype, p.q.data, p.q.offset(qs, h) + i * p.q.row_stride + d);
  }
  double k(int j, int d) const {
    return load(p.dtype, p.k.data, p.k.offset(ks, hk) + j * p.k.row_stride + d);
  }
  double v(int j, int d) const {
    return load(p.dtype, p.v.data, p.v.offset(ks, hk) + j * p.v.row_stride + d);
  }
  double slope() const {
    const ScoreMod& mod = p.features.score_mod;
    return load(accumulation(p.dtype), mod.alibi_slopes,
                b * mod.slopes_batch_stride + h * mod.slopes_head_stride);
  }
  double distance(int i, int j) const { return std::abs(double(i) + diagonal - j); }
  double sink() const {
    return load(accumulation(p.dtype), p.features.sink.logits, h * p.features.sink.head_stride);
  }
  bool kept(int i, int j) const {
    const ScoreMod& mod = p.features.score_mod;
    return mask.keep(i, j) && (!mod.mask.data || mod.mask_keeps({b, h, i, j}));
  }
  /// Score of a kept pair, and its derivative by softmax_scale q.k.
  ModifiedScore<double> score(int i, int j) const {
    const ScoreMod& mod = p.features.score_mod;
    double s = 0, slope_of_cap = 1;
    for (int d = 0; d < p.head_dim; ++d) s += q(i, d) * k(j, d);
    s *= p.softmax_scale;
    if (mod.softcap > 0) {
      const double t = std::tanh(s / mod.softcap);
      s = mod.softcap * t;
      slope_of_cap = 1 - t * t;
    }
    if (mod.bias.data) {
      s += load(mod.bias_is_float32 ? DType::kFloat32 : p.dtype, mod.bias.data,
                mod.bias.offset({b, h, i, j}));
    }
    if (mod.alibi_slopes) s -= slope() * distance(i, j);
    return {s, slope_of_cap};
  }
  /// How far score(i, j) and its derivative may be off, in units of the roundoff.
  ModifiedScore<double> score_error_units(int i, int j, const ModifiedScore<double>& s) const {
    const ScoreMod& mod = p.features.score_mod;
    double e = 0, e_slope = 0;
    for (int d = 0; d < p.head_dim; ++d) e += std::fabs(q(i, d) * k(j, d));
    e *= std::fabs(p.softmax_scale);
    if (mod.softcap > 0) {
      // c tanh(x / c), 1 - tanh^2: beside the error of x, tanh itself rounds.
      e_slope = 2 + 2 * s.slope * e / mod.softcap;
      e = s.slope * e + std::fmin(e, mod.softcap);
    }
    if (mod.bias.data) e += std::fabs(s.score);
    if (mod.alibi_slopes) e += std::fabs(s.score) + std::fabs(slope()) * distance(i, j);
    return {e, e_slope};
  }
  /// keep / (1 - p)
  double dropout_factor(int i, int j) const {
    const Dropout& dropout = p.features.dropout;
    if (!dropout.enabled()) return 1;
    return DropoutStream::of(dropout, b, h, p.num_heads).keep(i, j) ? double(dropout.scale) : 0;
  }
  /// lse of row i; -inf for a row that keeps nothing.
  double lse(int i) const {
    double max = p.features.sink.enabled() ? sink() : -INFINITY, sum = 0;
    for (int j = 0; j < ks.length; ++j)
      if (kept(i, j)) max = std::fmax(max, score(i, j).score);
    if (max == -INFINITY) return -INFINITY;
    for (int j = 0; j < ks.length; ++j)
      if (kept(i, j)) sum += std::exp(score(i, j).score - max);
    if (p.features.sink.enabled()) sum += std::exp(sink() - max);
    return max + std::log(sum);
  }
  double weight(int i, int j, double row_lse) const {
    return kept(i, j) && std::isfinite(row_lse) ? std::exp(score(i, j).score - row_lse) : 0;
  }
};

inline Result forward(const ForwardParams& p) {
  const int sq = p.q_layout.max, dv = p.head_dim_v;
  Result r{std::vector<double>(int64_t(p.batch) * p.num_heads * sq * dv, 0.0),
           std::vector<double>(int64_t(p.batch) * p.num_heads * sq, -INFINITY)};
  for (int b = 0; b < p.batch; ++b) {
    for (int h = 0; h < p.num_heads; ++h) {
      const Head head{p, b, h};
      for (int i = 0; i < head.qs.length; ++i) {
        const int64_t row = (int64_t(b) * p.num_heads + h) * sq + i;
        const double lse = r.lse[row] = head.lse(i);
        for (int j = 0; j < head.ks.length; ++j) {
          const double w = head.weight(i, j, lse) * head.dropout_factor(i, j);
          if (!head.kept(i, j)) continue;
          for (int d = 0; d < dv; ++d) r.out[row * dv + d] += w * head.v(j, d);
        }
      }
    }
  }
  return r;
}

/// In units of fp32's roundoff (in fp64 far below one): weights and dS below 2^-126 may become 0,
/// in products of bf16 all numbers.
constexpr double kWeightUnderflow = 0x1p-102;

/// Where the bias of a pair lies in the bias's own shape (sizes of 1 broadcast).
inline int64_t bias_index(const int (&shape)[4], ScoreCoord c) {
  const int at[4] = {c.batch, c.head, c.q, c.k};
  int64_t index = 0;
  for (int d = 0; d < 4; ++d) index = index * shape[d] + (shape[d] == 1 ? 0 : at[d]);
  return index;
}

/// dq, dk, dv, dbias, dslopes, dsink of BackwardParams. Of out and lse it takes what `saved` holds,
/// or the formula's: then all comes from q, k, v, dout, dlse alone.
///
/// `error_units`, if wanted, becomes to first order how far each result may be off in units of the
/// roundoff: where a product or sum rounds, by the size of its terms, and by what errors before it
/// make of it. A sum of n terms is taken to round once by the sum of their sizes. `operand_units`
/// is how far P and dS are off as operands of products, where these are rounded.
inline Gradients backward(const BackwardParams& p, const Result* saved = nullptr,
                          Gradients* error_units = nullptr, double operand_units = 0) {
  const int sq = p.q_layout.max, sk = p.k_layout.max, dqk = p.head_dim, dv = p.head_dim_v;
  const DType acc = accumulation(p.dtype);
  int64_t bias_size = 1;
  for (int size : p.bias_shape) bias_size *= size;
  Gradients g{std::vector<double>(int64_t(p.batch) * p.num_heads * sq * dqk, 0.0),
              std::vector<double>(int64_t(p.batch) * p.num_heads_k * sk * dqk, 0.0),
              std::vector<double>(int64_t(p.batch) * p.num_heads_k * sk * dv, 0.0),
              std::vector<double>(bias_size, 0.0),
              std::vector<double>((p.slopes_per_batch ? p.batch : 1) * p.num_heads, 0.0),
              std::vector<double>(p.num_heads, 0.0)};
  Gradients e = g;
  const double product_underflow = operand_units > 0 ? kWeightUnderflow : 0;
  const Result formula = saved ? Result{} : forward(p);
  const Result& result = saved ? *saved : formula;
  for (int b = 0; b < p.batch; ++b) {
    for (int h = 0; h < p.num_heads; ++h) {
      const Head head{p, b, h};
      for (int i = 0; i < head.qs.length; ++i) {
        const int64_t row = (int64_t(b) * p.num_heads + h) * sq + i;
        const double lse = result.lse[row];
        auto dout = [&](int d) {
          return load(p.dtype, p.dout.data, p.dout.offset(head.qs, h) + i * p.dout.row_stride + d);
        };
        // delta = rowsum(O o dO) - dLSE
        const double dlse = p.dlse.data ? load(acc, p.dlse.data, p.dlse.offset(head.qs, h) + i) : 0;
        double delta = -dlse, e_delta = std::fabs(dlse);
        for (int d = 0; d < dv; ++d) {
          const double term = result.out[row * dv + d] * dout(d);
          delta += term, e_delta += std::fabs(term);
        }
        if (p.features.sink.enabled() && lse != -INFINITY) {
          const double weight = std::exp(head.sink() - lse);
          const double e_weight =
              weight * (1 + std::fabs(head.sink()) + std::fabs(lse)) + kWeightUnderflow;
          g.dsink[h] -= weight * delta;
          e.dsink[h] += weight * e_delta + e_weight * std::fabs(delta);
        }
        for (int j = 0; j < head.ks.length; ++j) {
          const double weight = head.weight(i, j, lse);
          if (weight == 0) continue;
          const int64_t key = (int64_t(b) * p.num_heads_k + head.hk) * sk + j;
          const ModifiedScore<double> s = head.score(i, j);
          const ModifiedScore<double> e_s = head.score_error_units(i, j, s);
          const double e_weight = weight * (1 + e_s.score + std::fabs(lse)) + kWeightUnderflow;
          const double factor = head.dropout_factor(i, j);
          double dp = 0, e_dp = 0;
          for (int d = 0; d < dv; ++d) {
            const double term = factor * dout(d) * head.v(j, d);
            dp += term, e_dp += std::fabs(term);
            g.dv[key * dv + d] += weight * factor * dout(d);
            e.dv[key * dv + d] += (e_weight + operand_units * weight) * factor * std::fabs(dout(d));
          }
          const double ds = weight * (dp - delta);
          const double e_ds =
              weight * (e_dp + e_delta) + e_weight * std::fabs(dp - delta) + kWeightUnderflow;
          if (bias_size) {
            const int64_t at = bias_index(p.bias_shape, {b, h, i, j});
            g.dbias[at] += ds, e.dbias[at] += e_ds;
          }
          if (p.features.score_mod.alibi_slopes) {
            const int at = (p.slopes_per_batch ? b * p.num_heads : 0) + h;
            g.dslopes[at] -= ds * head.distance(i, j), e.dslopes[at] += e_ds * head.distance(i, j);
          }
          const double dscore = ds * s.slope * p.softmax_scale;
          const double e_dscore =
              (e_ds * s.slope + std::fabs(ds) * (e_s.slope + operand_units * s.slope)) *
                  std::fabs(p.softmax_scale) +
              product_underflow;
          for (int d = 0; d < dqk; ++d) {
            g.dq[row * dqk + d] += dscore * head.k(j, d);
            g.dk[key * dqk + d] += dscore * head.q(i, d);
            e.dq[row * dqk + d] += e_dscore * std::fabs(head.k(j, d)) + product_underflow;
            e.dk[key * dqk + d] += e_dscore * std::fabs(head.q(i, d)) + product_underflow;
          }
        }
      }
    }
  }
  if (error_units) *error_units = std::move(e);
  return g;
}

}  // namespace flash::reference
