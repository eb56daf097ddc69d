# SPDX-License-Identifier: BSD-3-Clause
"""Every gradient of every case on every backend, through out and lse, against float64."""

import dataclasses

import pytest
import torch
from cases import BY_NAME, GRID, SEED, grid_id, random_case
from inputs import make_inputs
from numerics import check_forward, check_grads, equal_bits, run, truth


def check_case(backend, poisoned, case, dtype):
    inputs = make_inputs(case, dtype, backend.device)
    with poisoned():
        ours = run(backend.attention, inputs)  # what it cannot take is skipped before the truth
    true = truth(case, dtype, backend.device)
    check_forward(true, ours)
    check_grads(true, ours)
    if backend.device == "cuda":  # the default there need not be deterministic
        check_grads(true, run(backend.attention, true.inputs))


@pytest.mark.parametrize("pair", GRID, ids=grid_id)
def test_backward(backend, poisoned, pair):
    check_case(backend, poisoned, *pair)


def test_random_case(backend, poisoned, random_index):
    case = random_case(f"{SEED}_{random_index}")
    check_case(backend, poisoned, case, backend.dtypes[random_index % len(backend.dtypes)])


ONE_AT_A_TIME = ["gqa_bias_sink_slopes", "all_features", "bias_full", "packed_features"]


@pytest.mark.parametrize("name", ONE_AT_A_TIME)
def test_one_gradient_at_a_time(backend, poisoned, name):
    """Asking for one gradient gives the bits that asking for all of them gives."""
    inputs = make_inputs(BY_NAME[name], backend.dtype, backend.device)
    with poisoned():
        together = run(backend.attention, inputs).grads
        for name, grad in together.items():
            alone = run(backend.attention, inputs, needs=[name]).grads
            assert list(alone) == [name]
            assert equal_bits(alone[name], grad), name


@pytest.mark.parametrize("which", ["out", "lse"])
@pytest.mark.parametrize("name", ["square", "gqa_bias_sink_slopes", "causal_bottom_right_tall"])
def test_gradient_of_one_output(backend, poisoned, name, which):
    """The other output is not used: its gradient is absent, which means zero."""
    inputs = make_inputs(BY_NAME[name], backend.dtype, backend.device)
    zeroed = {"dlse" if which == "out" else "dout": torch.zeros_like(
        inputs.dlse if which == "out" else inputs.dout)}  # fmt: skip
    leaves = {n: inputs.tensors[n].detach().requires_grad_() for n in inputs.differentiable()}
    with poisoned():
        expected = run(backend.attention, dataclasses.replace(inputs, **zeroed)).grads
        out, lse = backend.attention(**(inputs.tensors | leaves), **inputs.options)
        output, grad = (out, inputs.dout) if which == "out" else (lse, inputs.dlse)
        got = torch.autograd.grad(output, tuple(leaves.values()), grad, allow_unused=True)
    for (name, leaf), grad in zip(leaves.items(), got, strict=True):
        grad = torch.zeros_like(leaf) if grad is None else grad
        torch.testing.assert_close(grad, expected[name])


@pytest.mark.parametrize("name", ["causal_bottom_right_tall", "mask_empty_rows", "sink_empty_rows",
                                  "mask_nothing", "packed_unowned_rows"])  # fmt: skip
def test_gradients_of_empty_rows_are_zero(backend, poisoned, name):
    """dq exactly 0 where a row sees nothing, although its dout and dlse are not."""
    true = truth(BY_NAME[name], backend.dtype, backend.device)
    with poisoned():
        ours = run(backend.attention, true.inputs)
    exact = true.ref.grads["q"]
    empty = (exact == 0).all(-1)
    assert empty.any() and (ours.grads["q"][empty] == 0).all()


def test_broadcast_strides_of_gradients(backend):
    """A gradient of out that is expanded from one number, as out.sum().backward() makes it."""
    dtype = getattr(torch, backend.dtype)
    make = lambda *shape: torch.randn(shape, device=backend.device, dtype=dtype)  # noqa: E731
    q, k, v = make(2, 3, 33, 16), make(2, 3, 40, 16), make(2, 3, 40, 16)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, _ = backend.attention(*leaves)
    expanded = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    dense = torch.autograd.grad(out, leaves, torch.ones_like(out))
    for a, b in zip(expanded, dense, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.cuda
def test_more_heads_than_a_grid_dimension(backend):
    """batch x heads beyond 65535."""
    if backend.device == "cpu":
        pytest.skip("a limit of CUDA grids")
    make = lambda: torch.randn(70000, 1, 3, 8, device="cuda", dtype=torch.float16)  # noqa: E731
    q, k, v = (make().requires_grad_() for _ in range(3))
    out, _ = backend.attention(q, k, v, scale=8**-0.5)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    tail = [t[-5:].detach().requires_grad_() for t in (q, k, v)]
    out_tail, _ = backend.attention(*tail, scale=8**-0.5)
    grads_tail = torch.autograd.grad(out_tail, tail, torch.ones_like(out_tail))
    torch.testing.assert_close(out[-5:], out_tail)
    for grad, grad_tail in zip(grads, grads_tail, strict=True):
        torch.testing.assert_close(grad[-5:], grad_tail)
