// SPDX-License-Identifier: BSD-3-Clause
#pragma once

namespace flash::cpu {
namespace {

/// 2^f = sum_i kCoefficient[i] f^i on [-1/2, 1/2], with p(0) = 1: the largest score of a row weighs
/// exactly 1, and a row with one key copies that key's value bit for bit.
template <class Real>
struct Exp2Polynomial;

/// Minimax in relative error under that condition: 1.9e-9, below the rounding of fp32.
template <>
struct Exp2Polynomial<float> {
  static constexpr int kDegree = 6;
  static constexpr float kCoefficient[] = {1.f,
                                           0.6931472057f,
                                           0.2402264689f,
                                           0.05550328777f,
                                           0.009618488957f,
                                           0.001339993121f,
                                           0.0001534581216f};
};

/// Taylor, (ln 2)^i / i!: what is cut off is below (ln 2 / 2)^14 / 14! = 4e-18.
template <>
struct Exp2Polynomial<double> {
  static constexpr int kDegree = 13;
  static constexpr double kCoefficient[] = {1.0,
                                            0.69314718055994530942,
                                            0.24022650695910071233,
                                            0.055504108664821579953,
                                            0.0096181291076284771620,
                                            0.0013333558146428443423,
                                            0.00015403530393381609954,
                                            0.000015252733804059840280,
                                            1.3215486790144309488e-6,
                                            1.0178086009239699728e-7,
                                            7.0549116208011233299e-9,
                                            4.4455382718708114976e-10,
                                            2.5678435993488205141e-11,
                                            1.3691488853904128880e-12};
};

}  // namespace
}  // namespace flash::cpu
