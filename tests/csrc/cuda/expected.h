// SPDX-License-Identifier: BSD-3-Clause
// What the outputs of a Problem must hold, by the fp64 formula, and how far they are from it.
#pragma once

#include <algorithm>

#include "problem.h"

namespace flash {

/// A failure in words; empty: none.
using Verdict = std::string;

/// Largest error allowed, as a part of the largest expected value. simt rounds once to the dtype;
/// tensor-core backends also round P and dS.
inline double tolerance(DType dtype, bool rounds_once) {
  switch (dtype) {
    case DType::kFloat16:
      return rounds_once ? 6e-4 : 4e-3;
    case DType::kBFloat16:
      return rounds_once ? 5e-3 : 3e-2;
    case DType::kFloat32:
      return 2e-5;
    case DType::kFloat64:
      return 1e-12;
  }
  return 0;
}

/// Compares `actual` with `expected`: equal infinities, else errors below `bound` max(1,
/// |largest|).
class Comparison {
 public:
  Comparison(std::string what, double bound) : what_(std::move(what)), bound_(bound) {}
  void add(double actual, double expected) {
    if (actual == expected) return;
    if (std::isfinite(expected)) largest_ = std::max(largest_, std::fabs(expected));
    const double error = std::fabs(actual - expected);
    if (!(error <= worst_)) worst_ = error, actual_ = actual, expected_ = expected;
    if (std::isnan(error)) is_nan_ = true;
  }
  Verdict verdict() const {
    if (!is_nan_ && worst_ <= bound_ * std::max(1.0, largest_)) return {};
    char text[200];
    std::snprintf(text, sizeof text, "%s is %.9g, expected %.9g (largest %.3g, bound %.3g) ",
                  what_.c_str(), actual_, expected_, largest_, bound_);
    return text;
  }

 private:
  std::string what_;
  double bound_, worst_ = 0, largest_ = 0, actual_ = 0, expected_ = 0;
  bool is_nan_ = false;
};

/// Rows of a tensor against dense results [batch][heads][max][width]; rows that no sequence owns
/// must be `unowned`, and gaps between rows still NaN.
inline Verdict compare_rows(const char* what, DType dtype, const TensorView& view,
                            const SequenceLayout& layout, int batch, int heads, int width,
                            const std::vector<double>& dense, double unowned, double bound) {
  const int64_t rows = layout.packed() ? layout.total : layout.max;
  const int tensors = layout.packed() ? 1 : batch;
  std::vector<double> expected(int64_t(tensors) * heads * rows * width, unowned);
  for (int b = 0; b < batch; ++b) {
    const Sequence s = Sequence::of(layout, b);
    for (int h = 0; h < heads; ++h)
      for (int64_t i = 0; i < s.length; ++i)
        for (int d = 0; d < width; ++d)
          expected[((int64_t(s.batch_index) * heads + h) * rows + s.first_row + i) * width + d] =
              dense[((int64_t(b) * heads + h) * layout.max + i) * width + d];
  }
  Comparison comparison(what, bound);
  int64_t next = 0;
  bool gap_written = false;
  for (int t = 0; t < tensors; ++t)
    for (int h = 0; h < heads; ++h)
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = t * view.batch_stride + h * view.head_stride + i * view.row_stride;
        for (int d = 0; d < width; ++d)
          comparison.add(reference::load(dtype, view.data, at + d), expected[next++]);
        const int64_t pitch = std::min(view.row_stride, view.head_stride);
        for (int64_t d = width; d < pitch; ++d)
          gap_written |= !std::isnan(reference::load(dtype, view.data, at + d));
      }
  return comparison.verdict() + (gap_written ? std::string(what) + " was written outside " : "");
}

inline Verdict compare_row_values(const char* what, DType accumulation, const RowView& view,
                                  const SequenceLayout& layout, int batch, int heads,
                                  const std::vector<double>& dense, double unowned, double bound) {
  return compare_rows(what, accumulation, {view.data, view.batch_stride, view.head_stride, 1},
                      layout, batch, heads, 1, dense, unowned, bound);
}

inline Verdict compare_flat(const char* what, DType dtype, const void* data,
                            const std::vector<double>& expected, double bound) {
  Comparison comparison(what, bound);
  for (size_t i = 0; i < expected.size(); ++i)
    comparison.add(reference::load(dtype, data, int64_t(i)), expected[i]);
  return comparison.verdict();
}

/// W and its gradients, dense, from the lse that the parameters hold.
struct WeightsResult {
  std::vector<double> weights, dq, dk, dlse, dbias;
};

inline WeightsResult reference_weights(const WeightsBackwardParams& w) {
  const int sq = w.q_layout.max, sk = w.k_layout.max;
  const int64_t matrices = int64_t(w.batch) * (w.average ? 1 : w.num_heads);
  int64_t bias_size = w.dbias ? 1 : 0;
  for (int size : w.bias_shape) bias_size *= size;
  WeightsResult r{std::vector<double>(matrices * sq * sk, 0.0),
                  std::vector<double>(int64_t(w.batch) * w.num_heads * sq * w.head_dim, 0.0),
                  std::vector<double>(int64_t(w.batch) * w.num_heads_k * sk * w.head_dim, 0.0),
                  std::vector<double>(int64_t(w.batch) * w.num_heads * sq, 0.0),
                  std::vector<double>(bias_size, 0.0)};
  const double part = w.average ? 1.0 / w.num_heads : 1.0;
  for (int b = 0; b < w.batch; ++b)
    for (int h = 0; h < w.num_heads; ++h) {
      const reference::Head head{w, b, h};
      for (int i = 0; i < sq; ++i) {
        const int64_t row = (int64_t(b) * w.num_heads + h) * sq + i;
        const double lse = head.lse(i);
        for (int j = 0; j < sk; ++j) {
          const int64_t matrix = w.average ? b : int64_t(b) * w.num_heads + h;
          const int64_t pair = (matrix * sq + i) * sk + j;
          const double weight = head.weight(i, j, lse) * head.dropout_factor(i, j) * part;
          if (weight == 0) continue;
          r.weights[pair] += weight;
          const double ds = weight * reference::load(w.dtype, w.dweights, pair);
          r.dlse[row] -= ds;
          if (bias_size) r.dbias[reference::bias_index(w.bias_shape, {b, h, i, j})] += ds;
          const double dscore = ds * head.score(i, j).slope * w.softmax_scale;
          const int64_t key = (int64_t(b) * w.num_heads_k + head.hk) * sk + j;
          for (int d = 0; d < w.head_dim; ++d) {
            r.dq[row * w.head_dim + d] += dscore * head.k(j, d);
            r.dk[key * w.head_dim + d] += dscore * head.q(i, d);
          }
        }
      }
    }
  return r;
}

}  // namespace flash
