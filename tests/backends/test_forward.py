# SPDX-License-Identifier: BSD-3-Clause
"""out and lse of every case on every backend, against the formula in float64."""

import math

import pytest
import torch
from cases import BY_NAME, GRID, grid_id
from inputs import make_inputs
from numerics import check_forward, equal_bits, run, truth

from flash_attn import reference


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


@pytest.mark.parametrize("dim", [64, 128])
def test_mask_over_scores_that_grow(backend, poisoned, dim):
    """Keys are walked from the last. A third of the rows meets none of the last 200, others meet
    small scores first and large ones later: a kept maximum is missing, or too small for bfloat16
    and its tile done twice. 0.03 is two roundings of P and out, of values up to 4.5."""
    if backend.name in ("simt", "sm80"):
        pytest.skip("keeps no maximum")
    batch, heads, size, dtype = 2, 4, 704, torch.bfloat16
    q, k, v = (torch.randn(batch, heads, size, dim, dtype=dtype, device=backend.device)
               for _ in range(3))  # fmt: skip
    k[:, :, :400] *= 12
    k[:, :, 400:] *= 0.05
    mask = torch.rand(batch, 1, size, size, device=backend.device) < 0.5
    mask[:, :, ::3, 500:] = False
    mask[:, :, 7::11] = False
    mask[:, :, 5, 1:] = False
    options = {"mask": mask, "scale": 3 * dim**-0.5}
    with poisoned():
        out, lse = backend.attention(q, k, v, **options)
    expected, expected_lse = reference.attention(q.double(), k.double(), v.double(), **options)
    assert (out.double() - expected).abs().max() < 0.03
    empty = expected_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty) and (out[empty] == 0).all()
    assert ((lse.double() - expected_lse)[~empty]).abs().max() < 2e-3
