# SPDX-License-Identifier: BSD-3-Clause
"""out and lse of every case on every backend, against the formula in float64."""

import math

import pytest
import torch
from cases import BY_NAME, GRID, grid_id
from inputs import make_inputs
from numerics import check_forward, equal_bits, run, truth


@pytest.mark.parametrize("pair", GRID, ids=grid_id)
def test_forward(backend, poisoned, pair):
    inputs = make_inputs(*pair, backend.device)
    with poisoned():
        ours = run(backend.attention, inputs, grads=False)
    assert ours.out.dtype == inputs.dtype
    check_forward(truth(*pair, backend.device), ours)


@pytest.mark.parametrize("pair", [p for p in GRID if p[0].layout != "bhld"], ids=grid_id)
def test_strides_do_not_matter(backend, pair):
    """Bit for bit what contiguous copies give."""
    inputs = make_inputs(*pair, backend.device)
    strided = run(backend.attention, inputs, grads=False)
    copied = run(backend.attention, inputs.upcast(inputs.dtype), grads=False)
    assert equal_bits(strided.out, copied.out) and equal_bits(strided.lse, copied.lse)


@pytest.mark.parametrize("layout", ["bhld", "blhd", "lbhd", "hbld"])
def test_out_lies_as_q_lies(backend, layout):
    order = {"bhld": (0, 1, 2), "blhd": (0, 2, 1), "lbhd": (2, 0, 1), "hbld": (1, 0, 2)}[layout]
    sizes = (2, 3, 5)
    dtype = getattr(torch, backend.dtype)
    storage = torch.randn(*(sizes[dim] for dim in order), 16, device=backend.device, dtype=dtype)
    q = storage.permute(*(order.index(dim) for dim in range(3)), 3)
    k = v = torch.randn(2, 3, 7, 16, device=backend.device, dtype=dtype)
    out, lse = backend.attention(q, k, v)
    assert out.shape == q.shape and out.stride() == q.stride()
    assert lse.shape == sizes and lse.is_contiguous() and lse.dtype == torch.float32


@pytest.mark.parametrize("name", ["causal_bottom_right_tall", "mask_empty_rows", "no_keys",
                                  "mask_nothing", "sink_empty_rows", "packed_seqused"])  # fmt: skip
def test_empty_rows(backend, poisoned, name):
    """A row that sees nothing: out exactly 0, lse exactly -inf, or the sink."""
    inputs = make_inputs(BY_NAME[name], backend.dtype, backend.device)
    with poisoned():
        ours = run(backend.attention, inputs, grads=False)
    expected = truth(BY_NAME[name], backend.dtype, backend.device).ref
    out = ours.out if ours.out.shape[:-1] == ours.lse.shape else ours.out.transpose(0, 1)
    if "sink" in inputs.tensors:
        logits = inputs.tensors["sink"][:, None].expand_as(ours.lse)
        empty = (expected.lse == logits.double()) | (expected.lse == -math.inf)
        assert torch.equal(ours.lse[empty], expected.lse[empty].float())
    else:
        empty = expected.lse == -math.inf
        assert (ours.lse[empty] == -math.inf).all()
    assert empty.any() and (out[empty] == 0).all()
