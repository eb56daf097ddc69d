// SPDX-License-Identifier: BSD-3-Clause
//
// The gradients of attention. The algorithm is in backward_block.h, its tiles in panel.h, features
// in key_lanes.h, threads and sums over heads in backward_run.h.
#pragma once

#include "cpu/backward_run.h"

namespace flash::cpu {
namespace {

GradientTask task_of(const BackwardParams& p) {
  return {.p = p,
          .dout = p.dout,
          .dlse = p.dlse,
          .dq = p.dq,
          .dk = p.dk,
          .dv = p.dv,
          .lse_gradient = {},
          .dbias = p.dbias,
          .bias_shape = p.bias_shape,
          .dslopes = p.dslopes,
          .slopes_per_batch = p.slopes_per_batch,
          .dsink = p.dsink};
}
int64_t backward_workspace_bytes(const BackwardParams& p, int num_workers) {
  return BackwardRun(task_of(p), num_workers).workspace_bytes();
}
void run_backward(const BackwardParams& p, const Launch& launch) {
  const GradientTask task = task_of(p);
  BackwardRun(task, launch.workers ? launch.workers->count() : 1).run(launch);
}

}  // namespace
}  // namespace flash::cpu
