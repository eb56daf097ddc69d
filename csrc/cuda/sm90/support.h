// SPDX-License-Identifier: BSD-3-Clause
// What dispatch knows of the Hopper kernels. Host only.
#pragma once

#include <string>
#include <vector>

#include "attention/params.h"

namespace flash::cuda::sm90 {

/// Why the kernels cannot take a problem; empty: they can. The compute capability is the caller's
/// to check.
std::vector<std::string> why_forward_unsupported(const ForwardParams& p);
/// As far as the parameters of the forward tell.
std::vector<std::string> why_backward_unsupported(const ForwardParams& p);
/// Whether dout and the gradients start and step at multiples of 16 bytes.
bool gradients_are_aligned(const BackwardParams& p);

/// Whether the backward's kernel writes dbias: that of a bias in the dtype of q which no dimension
/// broadcasts is dS, block for block.
bool writes_bias_gradient(const BackwardParams& p);
/// Whether launch_bias_gradient has to, and can: the bias has all rows and columns, so that it does
/// not take keys away from every query.
bool sums_bias_gradient(const BackwardParams& p);

/// Whether either of them writes all of dbias: else it is cleared before.
bool fills_bias_gradient(const BackwardParams& p);

/// Late rows see more keys than early ones: tiles differ in work.
bool is_causal(const ForwardParams& p);

/// Sequences have lengths of their own: tiles differ in work.
bool is_ragged(const ForwardParams& p);

/// Smallest compiled head dim that holds both: 64, 96, 128, 192 or 256; 0: none.
int forward_head_dim(const ForwardParams& p);
int backward_head_dim(const ForwardParams& p);

int64_t forward_workspace_bytes(const ForwardParams& p);
int64_t backward_workspace_bytes(const BackwardParams& p);

/// Defined in instances/sm90_*.cu for the head dims above. The backward computes its own delta
/// from out, dout and dlse; dq, dk, dv and what writes_bias_gradient() says.
template <int kHeadDim, Variant kVariant>
void launch_forward(const ForwardParams& p, void* workspace, void* stream);
template <int kHeadDim, Variant kVariant>
void launch_backward(const BackwardParams& p, void* workspace, void* stream);
/// All of dbias, where sums_bias_gradient(), from what launch_backward left in the workspace.
/// kHeadDim: 64, 128, 192 or 256.
template <int kHeadDim>
void launch_bias_gradient(const BackwardParams& p, const void* workspace, void* stream);

}  // namespace flash::cuda::sm90
