# SPDX-License-Identifier: BSD-3-Clause
"""Memory is linear in the length: no N x N tensor anywhere, forward, backward, any feature."""

import json
import subprocess
import sys

import pytest
import torch

LENGTH, HEADS, DIM = 16384, 1, 32
MEBIBYTE = 2**20

CHILD = """
import json, resource, sys, torch
import flash_attn
options = json.loads(sys.argv[1])
length, heads, dim = {length}, {heads}, {dim}
attention = torch.ops.flash_attn.attention

def call(length):
    make = lambda: torch.randn(1, heads, length, dim, requires_grad=True)
    more = dict(options)
    leaves = [make(), make(), make()]
    if more.pop("bias", False):
        more["bias"] = torch.randn(1, heads, 1, length, requires_grad=True)
        leaves.append(more["bias"])
    if more.pop("mask", False):
        more["mask"] = torch.rand(1, 1, 1, length) < 0.9
    if more.pop("slopes", False):
        more["alibi_slopes"] = torch.rand(heads, requires_grad=True)
        leaves.append(more["alibi_slopes"])
    if "dropout_p" in more:
        more["rng_state"] = torch.tensor([1, 0])
    out, lse = attention(*leaves[:3], scale=dim**-0.5, **more)
    torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))

call(256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call(length)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""

FEATURES = {
    "plain": {"window_right": 0},
    "bias_and_mask": {"window_right": 0, "bias": True, "mask": True},
    "everything": {"window_left": 8000, "window_right": 0, "slopes": True, "softcap": 9.0,
                   "dropout_p": 0.2},
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_peak_of_the_process_on_cpu(name):
    """16k tokens: the tensors take 2 MiB each, one row of scores per thread is nothing, N x N would
    be 1024 MiB."""
    program = CHILD.format(length=LENGTH, heads=HEADS, dim=DIM)
    result = subprocess.run(
        [sys.executable, "-c", program, json.dumps(FEATURES[name])],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) * 1024 < 96 * MEBIBYTE, f"{int(result.stdout) / 1024:.0f} MiB"


@pytest.mark.cuda
@pytest.mark.parametrize("name", FEATURES)
def test_peak_on_the_device(backend, name):
    if backend.device == "cpu":
        pytest.skip("measured in a process of its own")
    options = dict(FEATURES[name])
    make = lambda: torch.randn(1, HEADS, LENGTH, DIM, device="cuda", dtype=torch.float16)  # noqa: E731
    q, k, v = (make().requires_grad_() for _ in range(3))
    if options.pop("bias", False):
        options["bias"] = torch.zeros(1, 1, 1, LENGTH, device="cuda", dtype=torch.float16)
    if options.pop("mask", False):
        options["mask"] = torch.rand(1, 1, 1, LENGTH, device="cuda") < 0.9
    if options.pop("slopes", False):
        options["alibi_slopes"] = torch.rand(HEADS, device="cuda")
    if "dropout_p" in options:
        options["rng_state"] = torch.tensor([1, 0], device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, _ = backend.attention(q, k, v, scale=DIM**-0.5, **options)
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 96 * MEBIBYTE, f"{peak / MEBIBYTE:.0f} MiB"
