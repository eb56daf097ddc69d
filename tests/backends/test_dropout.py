# SPDX-License-Identifier: BSD-3-Clause
"""The dropout mask is a function of (seed, offset, sequence, head, query, key) alone: the bits of
the reference on every device, in both passes, dense and packed."""

import math

import pytest
import torch

from flash_attn import reference

CHUNK = 64


def rng_state(device, seed=0x1234567890ABCDEF, offset=8):
    return torch.tensor([seed, offset], device=device)


def kept_in_forward(call, batch, heads, size_q, size_k, dtype, device):
    """Which weights are not 0, read through values that are columns of the identity."""
    kept = torch.zeros(batch, heads, size_q, size_k, dtype=torch.bool, device=device)
    q = torch.zeros(batch, heads, size_q, CHUNK, dtype=dtype, device=device)
    k = torch.zeros(batch, heads, size_k, CHUNK, dtype=dtype, device=device)
    for begin in range(0, size_k, CHUNK):
        width = min(CHUNK, size_k - begin)
        v = torch.zeros(batch, heads, size_k, CHUNK, dtype=dtype, device=device)
        v[:, :, range(begin, begin + width), range(width)] = 1
        kept[..., begin : begin + width] = call(q, k, v)[0][..., :width] != 0
    return kept


SHAPES = [(1, 1, 1, 1), (2, 3, 50, 70), (1, 2, 200, 33), (1, 1, 16, 32), (2, 1, 129, 300)]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mask_is_that_of_the_reference(backend, dtype, shape, p):
    state = rng_state(backend.device)

    def call(q, k, v):
        return backend.attention(q, k, v, rng_state=state, dropout_p=p)

    kept = kept_in_forward(call, *shape, dtype, backend.device)
    assert torch.equal(kept, reference.dropout_keep(state, shape, p))
    assert torch.equal(kept.cpu(), reference.dropout_keep(state.cpu(), shape, p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_uses_the_same_mask(backend, dtype):
    """dv_j = sum_i p_ij keep_ij do_i: with the identity for do, dv is the mask, transposed."""
    shape, state = (2, 2, 64, 150), rng_state(backend.device, seed=-5, offset=0)
    batch, heads, size_q, size_k = shape
    make = lambda *sizes: torch.zeros(*sizes, dtype=dtype, device=backend.device)  # noqa: E731
    q, k = make(batch, heads, size_q, 64), make(batch, heads, size_k, 64)
    v = make(batch, heads, size_k, size_q).requires_grad_()
    eye = torch.eye(size_q, dtype=dtype, device=backend.device).expand(batch, heads, -1, -1)
    out, _ = backend.attention(q, k, v, rng_state=state, dropout_p=0.4)
    (dv,) = torch.autograd.grad(out, v, eye)
    assert torch.equal(dv.mT != 0, reference.dropout_keep(state, shape, 0.4))


def test_packing_does_not_matter(backend):
    lengths_q, lengths_k, heads, dim = (33, 0, 70), (40, 5, 90), 2, 64
    state, dtype = rng_state(backend.device), torch.bfloat16
    make = lambda n: torch.randn(n, heads, dim, dtype=dtype, device=backend.device)  # noqa: E731
    q, k, v = make(sum(lengths_q)), make(sum(lengths_k)), make(sum(lengths_k))
    ends = lambda lengths: torch.tensor(  # noqa: E731
        [0, *lengths]).cumsum(0).to(backend.device, torch.int32)  # fmt: skip
    packed, _ = backend.attention(
        q, k, v, cu_seqlens_q=ends(lengths_q), cu_seqlens_k=ends(lengths_k), max_seqlen_q=70,
        max_seqlen_k=90, rng_state=state, dropout_p=0.3, scale=0.1,
    )  # fmt: skip
    for b in range(3):
        rows = slice(sum(lengths_q[:b]), sum(lengths_q[: b + 1]))
        keys = slice(sum(lengths_k[:b]), sum(lengths_k[: b + 1]))
        one = [t.transpose(0, 1)[None].expand(3, -1, -1, -1) for t in (q[rows], k[keys], v[keys])]
        dense, _ = backend.attention(*one, rng_state=state, dropout_p=0.3, scale=0.1)
        torch.testing.assert_close(dense[b].transpose(0, 1), packed[rows], rtol=0, atol=0)


def test_almost_no_dropout_is_none(backend):
    """p = 1e-30 keeps everything and changes no bit."""
    make = lambda: torch.randn(2, 2, 70, 64, dtype=torch.float16, device=backend.device)  # noqa: E731
    q, k, v = make(), make(), make()
    without = backend.attention(q, k, v)
    almost = backend.attention(q, k, v, rng_state=rng_state(backend.device), dropout_p=1e-30)
    assert torch.equal(without[0], almost[0]) and torch.equal(without[1], almost[1])


def test_everything_dropped(backend, poisoned):
    make = lambda: torch.randn(2, 2, 70, 64, dtype=torch.float16, device=backend.device)  # noqa: E731
    q, k, v = (make().requires_grad_() for _ in range(3))
    with poisoned():
        out, lse = backend.attention(q, k, v, rng_state=rng_state(backend.device), dropout_p=1.0)
        grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert (out == 0).all() and lse.isfinite().all()
    assert all((grad == 0).all() for grad in grads)


def test_lse_is_before_dropout(backend):
    """On tensor cores to rounding: a call with dropout is a kernel of its own there."""
    make = lambda: torch.randn(2, 2, 70, 64, dtype=torch.float16, device=backend.device)  # noqa: E731
    q, k, v = make(), make(), make()
    _, without = backend.attention(q, k, v)
    _, dropped = backend.attention(q, k, v, rng_state=rng_state(backend.device), dropout_p=0.5)
    bits = 2**-22 if backend.name.startswith("sm") else 0
    torch.testing.assert_close(without, dropped, rtol=bits, atol=bits)


def test_keep_fraction(backend):
    shape, p = (2, 4, 256, 256), 0.3
    state = rng_state(backend.device, seed=77)

    def call(q, k, v):
        return backend.attention(q, k, v, rng_state=state, dropout_p=p)

    kept = kept_in_forward(call, *shape, torch.float16, backend.device).double()
    deviation = math.sqrt(p * (1 - p) / kept.numel())
    assert abs(kept.mean().item() - (1 - p)) < 5 * deviation + 1e-5
    per_head = kept.mean((2, 3)) - (1 - p)
    assert per_head.abs().max() < 5 * math.sqrt(p * (1 - p) / 256**2) + 1e-5


def test_rng_state_draws(backend):
    like = torch.empty(1, device=backend.device)
    draw = lambda: torch.ops.flash_attn.rng_state(like, 8)  # noqa: E731
    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    again = draw()
    assert first.dtype == torch.int64 and first.shape == (2,) and first.device == like.device
    assert torch.equal(first, again) and not torch.equal(first, second)
    if backend.device == "cuda":
        assert second[0] == first[0] and second[1] == first[1] + 8
    else:
        assert first[1] == 0 and second[1] == 0
