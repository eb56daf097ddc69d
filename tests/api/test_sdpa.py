# SPDX-License-Identifier: BSD-3-Clause
"""flash_attn.scaled_dot_product_attention means what torch's function means.

The oracle is torch's MATH backend on float64 copies; where torch's backends disagree with its
documentation, the documentation's formula.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import flash_attn

sdpa = flash_attn.scaled_dot_product_attention
builtin = F.scaled_dot_product_attention


def oracle(q, k, v, *args, **kwargs):
    with sdpa_kernel(SDPBackend.MATH):
        return builtin(q, k, v, *args, **kwargs)


def make(*shape, dtype=torch.float64, grad=True):
    return torch.randn(shape, dtype=dtype, requires_grad=grad)


def assert_same(q, k, v, attn_mask=None, **kwargs):
    """Output and every gradient, in float64."""
    leaves = [t for t in (q, k, v, attn_mask) if t is not None and t.requires_grad]
    ours, theirs = sdpa(q, k, v, attn_mask, **kwargs), oracle(q, k, v, attn_mask, **kwargs)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(theirs)
    if leaves:
        for a, b in zip(torch.autograd.grad(ours, leaves, grad),
                        torch.autograd.grad(theirs, leaves, grad), strict=True):  # fmt: skip
            torch.testing.assert_close(a, b)


RANKS = [
    ((5, 8), (7, 8), (7, 8)),
    ((3, 5, 8), (3, 7, 8), (3, 7, 8)),
    ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8)),
    ((2, 3, 5, 8), (1, 3, 7, 8), (2, 1, 7, 8)),
    ((2, 8, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    ((1, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    ((5, 8), (2, 3, 7, 8), (3, 7, 8)),
    ((2, 3, 5, 8), (7, 8), (7, 8)),
    ((4, 1, 5, 8), (1, 3, 7, 8), (1, 7, 8)),
    ((2, 1, 2, 3, 5, 8), (1, 2, 1, 3, 7, 8), (7, 8)),
]


@pytest.mark.parametrize("shapes", RANKS, ids=str)
def test_ranks_and_broadcasting(shapes):
    assert_same(*(make(*shape) for shape in shapes))
    assert_same(*(make(*shape) for shape in shapes), is_causal=True)


MASK_SHAPES = [(7,), (1, 7), (5, 1), (5, 7), (3, 5, 7), (3, 1, 7), (1, 1, 7), (2, 1, 1, 7),
               (2, 3, 5, 7), (1, 3, 5, 7), (2, 1, 5, 1), (1, 1, 1, 1), ()]  # fmt: skip


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mask_shapes(kind, shape):
    q, k, v = make(2, 3, 5, 8), make(2, 3, 7, 8), make(2, 3, 7, 8)
    mask = torch.rand(shape) < 0.6 if kind == "bool" else make(*shape)
    assert_same(q, k, v, mask.expand(1, 7) if shape in ((), (7,)) and kind == "bool" else mask)
    if kind == "bool":
        torch.testing.assert_close(sdpa(q, k, v, mask), oracle(q, k, v, mask.expand(2, 3, 5, 7)))


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_masks_of_other_ranks(rank):
    leading = (2, 2, 3)[3 - (rank - 2) :] if rank > 2 else ()
    q, k, v = make(*leading, 5, 8), make(*leading, 7, 8), make(*leading, 7, 8)
    assert_same(q, k, v, make(5, 7))
    assert_same(q, k, v, torch.rand(*leading, 5, 7) < 0.5)
    if rank == 5:
        assert_same(q, k, v, make(2, 1, 3, 1, 7))


def test_strides_of_masks():
    q, k, v = make(2, 3, 5, 8), make(2, 3, 7, 8), make(2, 3, 7, 8)
    assert_same(q, k, v, torch.randn(7, 5, dtype=torch.float64).mT)
    assert_same(q, k, v, torch.randn(1, 1, 5, 1, dtype=torch.float64).expand(2, 3, 5, 7))
    assert_same(q, k, v, (torch.rand(2, 3, 10, 14) < 0.5)[:, :, ::2, ::2])
    assert_same(q, k, v, make(5, 7).expand(2, 3, 5, 7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_mask_for_16_bit(dtype):
    q, k, v = (make(2, 3, 6, 8, dtype=dtype) for _ in range(3))
    mask = make(6, 6, dtype=torch.float32)
    out = sdpa(q, k, v, mask)
    exact = oracle(q.double(), k.double(), v.double(), mask.double())
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.02)
    (grad,) = torch.autograd.grad(out.float().sum(), mask)
    assert grad.dtype == torch.float32 and grad.shape == mask.shape and (grad != 0).any()


def test_gradient_of_the_mask_alone():
    q, k, v = (make(2, 3, 6, 8, grad=False) for _ in range(3))
    for shape in ((6,), (6, 1), (3, 1, 6), (2, 3, 6, 6), (1, 1, 1, 1)):
        assert_same(q, k, v, make(*shape))


def test_fully_masked_rows():
    """Exactly 0, with gradients exactly 0."""
    q, k, v = (make(2, 3, 6, 8) for _ in range(3))
    keep = torch.rand(2, 1, 6, 6) < 0.5
    keep[:, :, 2] = False
    for mask in (keep, torch.zeros(2, 1, 6, 6, dtype=torch.float64).masked_fill(~keep, -math.inf)):
        out = sdpa(q, k, v, mask)
        assert (out[:, :, 2] == 0).all()
        (dq,) = torch.autograd.grad(out, q, torch.ones_like(out), retain_graph=True)
        assert (dq[:, :, 2] == 0).all() and dq.isfinite().all()
        assert_same(q, k, v, mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_of_the_lowest_number_are_not_empty(dtype):
    """The ordinary softmax of what is left of the scores beside finfo.min."""
    q, k, v = (torch.randn(1, 2, 4, 8).to(dtype) for _ in range(3))
    mask = torch.full((4, 4), torch.finfo(dtype).min, dtype=dtype)
    exact = oracle(q.double(), k.double(), v.double(), mask.double())
    torch.testing.assert_close(sdpa(q, k, v, mask).double(), exact, rtol=0.02, atol=0.02)


def test_regression_of_lengths_64_beyond_128():
    """Finite gradients at seqlen % 128 == 64 with a mask."""
    q, k, v = (make(1, 2, 192, 16, dtype=torch.bfloat16) for _ in range(3))
    mask = torch.zeros(1, 1, 192, 192, dtype=torch.bfloat16).masked_fill(
        torch.rand(192, 192) < 0.5, torch.finfo(torch.bfloat16).min
    )
    grads = torch.autograd.grad(sdpa(q, k, v, mask).sum(), (q, k, v))
    assert all(grad.isfinite().all() for grad in grads)


GQA = [((2, 8, 5, 4), (2, 2, 7, 4), (2, 2, 7, 4)), ((2, 8, 5, 4), (2, 4, 7, 4), (2, 2, 7, 4)),
       ((8, 5, 4), (2, 7, 4), (2, 7, 4)), ((2, 2, 6, 5, 4), (2, 2, 3, 7, 4), (2, 2, 1, 7, 4)),
       ((2, 6, 5, 4), (1, 3, 7, 4), (2, 3, 7, 4)),
       ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4))]  # fmt: skip


@pytest.mark.parametrize("shapes", GQA, ids=str)
def test_grouped_heads(shapes):
    q, k, v = (make(*shape) for shape in shapes)

    def repeated(x):
        return x.repeat_interleave(q.shape[-3] // x.shape[-3], -3)

    ours = sdpa(q, k, v, enable_gqa=True)
    theirs = oracle(q, repeated(k), repeated(v))
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(theirs)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), grad),
                    torch.autograd.grad(theirs, (q, k, v), grad), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


ZERO = [(0, 3, 5, 7, 8, 8), (2, 0, 5, 7, 8, 8), (2, 3, 0, 7, 8, 8), (2, 3, 5, 0, 8, 8),
        (2, 3, 5, 7, 0, 8), (2, 3, 5, 7, 8, 0), (0, 0, 0, 0, 0, 0)]  # fmt: skip


@pytest.mark.parametrize("sizes", ZERO, ids=str)
@pytest.mark.parametrize("mask", [None, "causal", "bool"])
def test_zero_sizes(sizes, mask):
    batch, heads, size_q, size_k, dim, dim_v = sizes
    q, k, v = make(batch, heads, size_q, dim), make(batch, heads, size_k, dim), make(
        batch, heads, size_k, dim_v)  # fmt: skip
    options = {"is_causal": mask == "causal", "scale": None}
    keep = torch.rand(size_q, size_k) < 0.5 if mask == "bool" else None
    out = sdpa(q, k, v, keep, **options)
    assert out.shape == (batch, heads, size_q, dim_v)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    for grad, leaf in zip(grads, (q, k, v), strict=True):
        assert grad.shape == leaf.shape and grad.isfinite().all()
    if size_k == 0:
        assert (out == 0).all()
    if dim == 0 and out.numel() and mask is None:
        torch.testing.assert_close(out, v.mean(-2, keepdim=True).expand_as(out))


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0, 1])
def test_scale(scale):
    q, k, v = make(2, 3, 5, 8), make(2, 3, 7, 8), make(2, 3, 7, 8)
    ours = sdpa(q, k, v, scale=scale)
    weights = torch.softmax(q @ k.mT * scale, -1)
    torch.testing.assert_close(ours, weights @ v)


@pytest.mark.parametrize("size", [(5, 7), (7, 5), (6, 6), (1, 4)])
def test_causal_is_top_left(size):
    q, k, v = make(2, 3, size[0], 8), make(2, 3, size[1], 8), make(2, 3, size[1], 8)
    tril = torch.ones(size, dtype=torch.bool).tril()
    torch.testing.assert_close(sdpa(q, k, v, is_causal=True), oracle(q, k, v, tril))


@pytest.mark.parametrize("size", [(5, 7), (7, 5), (6, 6)])
@pytest.mark.parametrize("variant", [causal_upper_left, causal_lower_right])
def test_causal_bias(size, variant):
    q, k, v = make(2, 3, size[0], 8), make(2, 3, size[1], 8), make(2, 3, size[1], 8)
    diagonal = 0 if variant is causal_upper_left else size[1] - size[0]
    keep = torch.ones(size, dtype=torch.bool).tril(diagonal)
    expected = oracle(q, k, v, keep)
    torch.testing.assert_close(sdpa(q, k, v, variant(*size)), expected)
    with flash_attn.sdpa_patch():
        torch.testing.assert_close(
            F.scaled_dot_product_attention(q, k, v, variant(*size)), expected
        )
        torch.testing.assert_close(builtin(q, k, v, variant(*size)), expected)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 0, 2)])
def test_out_lies_as_query_lies(order):
    sizes = (2, 3, 5)
    q = torch.randn(*(sizes[d] for d in order), 8).permute(*(order.index(d) for d in range(3)), 3)
    k = v = torch.randn(2, 3, 7, 8)
    out = sdpa(q, k, v)
    assert out.stride() == q.stride()
    torch.testing.assert_close(out, oracle(q, k, v))
    if order == (0, 2, 1):
        assert out.transpose(1, 2).reshape(2, 5, 24).data_ptr() == out.data_ptr()


def test_any_strides():
    base = torch.randn(2, 3, 20, 16, dtype=torch.float64)
    assert_same(base[..., ::2, ::2], base[:, :, 5:, 8:], base[:, :, :15, 3:10])
    assert_same(base.transpose(-1, -2)[..., :8, :], make(2, 3, 9, 20), make(2, 3, 9, 4))
    one = torch.randn(2, 3, 5, 4, dtype=torch.float64)[..., 1:2]
    assert_same(one, one[:, :, :3], one[:, :, :3])
    assert_same(make(4, 1, 5, 8).expand(4, 6, 5, 8), make(1, 1, 7, 8).expand(4, 6, 7, 8),
                make(1, 6, 7, 8).expand(4, 6, 7, 8))  # fmt: skip


def test_dropout():
    q, k, v = (make(2, 4, 64, 64, dtype=torch.float32) for _ in range(3))
    torch.manual_seed(3)
    first, second = sdpa(q, k, v, dropout_p=0.5), sdpa(q, k, v, dropout_p=0.5)
    torch.manual_seed(3)
    again = sdpa(q, k, v, dropout_p=0.5)
    assert torch.equal(first, again) and not torch.equal(first, second)
    state = torch.get_rng_state()
    sdpa(q, k, v)
    assert torch.equal(state, torch.get_rng_state())
    ones = torch.ones_like(v)
    kept = sdpa(q * 0, k, ones, dropout_p=0.25)
    assert abs(kept.mean().item() - 1) < 0.02
    nothing = sdpa(q, k, v, dropout_p=1.0)
    assert (nothing == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(nothing.sum(), (q, k, v)))


def test_dropout_mask_is_what_attention_drops():
    state = torch.tensor([42, 8])
    keep = flash_attn.dropout_mask(state, (2, 3, 20, 30), 0.4)
    q, k, v = make(2, 3, 20, 8), make(2, 3, 30, 8), make(2, 3, 30, 8)
    out = flash_attn.attention(q, k, v, dropout_p=0.4, rng_state=state)
    weights = torch.softmax(q @ k.mT / math.sqrt(8), -1) * keep / 0.6
    torch.testing.assert_close(out, weights @ v)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_call(data):
    """Shapes, broadcasting, masks and scales drawn together."""
    size_q, size_k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    dim, dim_v = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    leading = data.draw(st.lists(st.integers(1, 3), max_size=3))

    def broadcast(sizes):
        sizes = [data.draw(st.sampled_from([1, size])) for size in sizes]
        return sizes[data.draw(st.integers(0, len(sizes))) :]

    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    q = make(*broadcast(leading), size_q, dim)
    k, v = make(*broadcast(leading), size_k, dim), make(*broadcast(leading), size_k, dim_v)
    scores = [*torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2]), size_q, size_k]
    kind = data.draw(st.sampled_from([None, "causal", "bool", "float"]))
    scale = data.draw(st.sampled_from([None, 0.7, -1.0]))
    if kind in ("bool", "float"):
        shape = broadcast(scores)
        mask = torch.rand(shape) < 0.7 if kind == "bool" else make(*shape)
        ours = sdpa(q, k, v, mask, scale=scale)
        full = mask if kind == "float" else torch.zeros(shape, dtype=q.dtype).masked_fill(
            ~mask, -math.inf)  # fmt: skip
    else:
        mask, full = None, None
        ours = sdpa(q, k, v, is_causal=kind == "causal", scale=scale)
    s = (q @ k.mT) * (dim**-0.5 if scale is None else scale)
    if kind == "causal":
        s = s.masked_fill(~torch.ones(size_q, size_k, dtype=torch.bool).tril(), -math.inf)
    s = s if full is None else s + full
    empty = (s == -math.inf).all(-1, keepdim=True)
    weights = torch.where(empty, 0, torch.softmax(torch.where(empty, 0, s), -1))
    torch.testing.assert_close(ours, weights @ v)
