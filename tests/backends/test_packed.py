# SPDX-License-Identifier: BSD-3-Clause
"""Packed sequences: each gives what it gives alone, and nothing outside them is read or left."""

import math

import pytest
import torch
from numerics import equal_bits

LENGTHS_Q, LENGTHS_K, HEADS, HEADS_K, DIM = (33, 0, 128, 1, 70), (40, 7, 128, 64, 0), 4, 2, 64
OPTIONS = {
    "full": {},
    "causal": {"window_right": 0, "bottom_right": True},
    "top_left": {"window_right": 0},
    "window": {"window_left": 20, "window_right": 3, "bottom_right": True},
    "softcap": {"softcap": 3.0},
    "prefix": {"window_right": 0, "prefix": 12},
}


def ends(lengths, device, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)


def make(device, dtype):
    def normal(rows, heads):
        return torch.randn(rows, heads, DIM, dtype=dtype, device=device)

    q, k = normal(sum(LENGTHS_Q), HEADS), normal(sum(LENGTHS_K), HEADS_K)
    return q, k, normal(sum(LENGTHS_K), HEADS_K), normal(sum(LENGTHS_Q), HEADS)


def call(backend, q, k, v, dout, **options):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse = backend.attention(*leaves, scale=DIM**-0.5, deterministic=True, **options)
    grads = torch.autograd.grad((out, lse), leaves, (dout, torch.ones_like(lse)))
    return out.detach(), lse.detach(), *grads


def packed_arguments(device):
    return {
        "cu_seqlens_q": ends(LENGTHS_Q, device),
        "cu_seqlens_k": ends(LENGTHS_K, device),
        "max_seqlen_q": max(LENGTHS_Q),
        "max_seqlen_k": max(LENGTHS_K),
    }


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request, backend):
    return request.param


@pytest.mark.parametrize("name", OPTIONS)
def test_each_sequence_as_alone(backend, poisoned, dtype, name):
    """A sequence among others has the bits that it has as the only one."""
    q, k, v, dout = make(backend.device, dtype)
    bounds = {"max_seqlen_q": max(LENGTHS_Q), "max_seqlen_k": max(LENGTHS_K)}
    with poisoned():
        out, lse, dq, dk, dv = call(
            backend, q, k, v, dout, **packed_arguments(backend.device), **OPTIONS[name]
        )
        for b in range(len(LENGTHS_Q)):
            rows = slice(sum(LENGTHS_Q[:b]), sum(LENGTHS_Q[: b + 1]))
            keys = slice(sum(LENGTHS_K[:b]), sum(LENGTHS_K[: b + 1]))
            one = call(backend, q[rows], k[keys], v[keys], dout[rows], **bounds, **OPTIONS[name],
                       cu_seqlens_q=ends(LENGTHS_Q[b : b + 1], backend.device),
                       cu_seqlens_k=ends(LENGTHS_K[b : b + 1], backend.device))  # fmt: skip
            expected = (out[rows], lse[:, rows], dq[rows], dk[keys], dv[keys])
            for got, want in zip(one, expected, strict=True):
                assert equal_bits(got, want), f"sequence {b}"


@pytest.mark.parametrize("length", [40, 128, 200])
@pytest.mark.parametrize("name", OPTIONS)
def test_packed_is_dense(backend, poisoned, dtype, name, length):
    """Sequences of one length: packed and dense calls give the same bits."""
    batch = 3
    q, k, v, dout = (
        torch.randn(batch * length, heads, DIM, dtype=dtype, device=backend.device)
        for heads in (HEADS, HEADS_K, HEADS_K, HEADS)
    )
    bounds = ends([length] * batch, backend.device)

    def unpack(t):
        return t.unflatten(0, (batch, length)).transpose(1, 2)

    with poisoned():
        packed = call(backend, q, k, v, dout, cu_seqlens_q=bounds, cu_seqlens_k=bounds,
                      max_seqlen_q=length, max_seqlen_k=length, **OPTIONS[name])  # fmt: skip
        dense = call(backend, *map(unpack, (q, k, v, dout)), **OPTIONS[name])
    assert equal_bits(packed[1].unflatten(1, (batch, length)).transpose(0, 1), dense[1])
    for got, want in zip((packed[0], *packed[2:]), (dense[0], *dense[2:]), strict=True):
        assert equal_bits(unpack(got), want)


@pytest.mark.parametrize("change", ["int64", "larger_max", "unknown_max"])
def test_ways_to_say_the_same(backend, dtype, change):
    q, k, v, dout = make(backend.device, dtype)
    arguments = packed_arguments(backend.device)
    expected = call(backend, q, k, v, dout, **arguments)
    if change == "int64":
        arguments["cu_seqlens_q"] = ends(LENGTHS_Q, backend.device, torch.int64)
        arguments["cu_seqlens_k"] = ends(LENGTHS_K, backend.device, torch.int64)
    else:
        grow = 100 if change == "larger_max" else -128
        arguments |= {f"max_seqlen_{x}": 128 + grow for x in "qk"}
    got = call(backend, q, k, v, dout, **arguments)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b)


def test_unowned_rows(backend, poisoned, dtype):
    """Rows before, between (by seqused) and behind the sequences: out 0, lse -inf, gradients 0."""
    q, k, v, dout = make(backend.device, dtype)
    arguments = packed_arguments(backend.device)
    arguments["cu_seqlens_q"] = arguments["cu_seqlens_q"].clamp(3, 200)
    used = torch.tensor([10, 0, 100, 1, 9], dtype=torch.int32, device=backend.device)
    starts = arguments["cu_seqlens_q"][:-1].tolist()
    owned = torch.zeros(q.shape[0], dtype=torch.bool)
    stops = arguments["cu_seqlens_q"][1:].tolist()
    for start, count, end in zip(starts, used.tolist(), stops, strict=True):
        owned[start : min(start + count, end)] = True
    with poisoned():
        out, lse, dq, dk, dv = call(backend, q, k, v, dout, seqused_q=used, **arguments)
    assert (out[~owned] == 0).all() and (lse[:, ~owned] == -math.inf).all()
    assert (dq[~owned] == 0).all()
    assert (dk[sum(LENGTHS_K) :] == 0).all() and dk.isfinite().all() and dv.isfinite().all()


@pytest.mark.cuda
def test_wild_lengths_on_the_device_are_harmless(backend, dtype):
    """CUDA cannot check cu_seqlens without waiting for it; it cuts them to the tensor."""
    if backend.device == "cpu":
        pytest.skip("checked with a message on the CPU")
    q, k, v, dout = make(backend.device, dtype)
    for wild in ([0, -5, 1 << 30, 7, 3, 9], [-(1 << 31), 5, 4, 3, 2, (1 << 31) - 1]):
        bounds = torch.tensor(wild, dtype=torch.int32, device="cuda")
        out, *_ = call(backend, q, k, v, dout, cu_seqlens_q=bounds, cu_seqlens_k=bounds,
                       max_seqlen_q=128, max_seqlen_k=128)  # fmt: skip
        torch.cuda.synchronize()
        assert out.shape == q.shape


@pytest.mark.cuda
@pytest.mark.parametrize("lengths", [(1024, 2048), (2048, 1024), (2048, 0)])
@pytest.mark.parametrize("name", ["full", "causal"])
def test_more_heads_than_are_in_work(backend, poisoned, lengths, name):
    """Heads of long and short sequences follow each other through the scratch memory of a backward
    pass; each gives what it gives without the others."""
    if backend.device == "cpu":
        pytest.skip("its scratch memory is a thread's own")
    q, k, v, dout = (
        torch.randn(2, 32, 2048, 64, dtype=torch.bfloat16, device="cuda") for _ in range(4)
    )
    used = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    with poisoned():
        together = call(backend, q, k, v, dout, seqused_q=used, seqused_k=used, **OPTIONS[name])
        for b in range(2):
            one = slice(b, b + 1)
            alone = call(backend, q[one], k[one], v[one], dout[one],
                         seqused_q=used[one], seqused_k=used[one], **OPTIONS[name])  # fmt: skip
            for got, want in zip(together, alone, strict=True):
                assert equal_bits(got[one], want), f"sequence {b}"
