# SPDX-License-Identifier: BSD-3-Clause
"""What is masked does not leak, what is attended propagates (docs: numerical promises)."""

import math

import pytest
import torch
from numerics import equal_bits

BATCH, HEADS, SIZE_Q, SIZE_K, DIM = 2, 3, 70, 90, 64
NAN, INF = math.nan, math.inf


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def make(request, backend):
    """Inputs (q, k, v, dout) of the case, fresh each time."""

    def inputs(dim=DIM):
        def normal(size):
            return torch.randn(BATCH, HEADS, size, dim, dtype=request.param, device=backend.device)

        return normal(SIZE_Q), normal(SIZE_K), normal(SIZE_K), normal(SIZE_Q)

    return inputs


def forward_backward(backend, poisoned, q, k, v, dout, **options):
    """out, lse and the gradients (dq, dk, dv, and dbias where there is a bias)."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    bias = options.pop("bias", None)
    if bias is not None:
        bias = bias.detach().requires_grad_()
        leaves.append(bias)
    with poisoned():
        out, lse = backend.attention(*leaves[:3], bias=bias, scale=q.shape[-1] ** -0.5, **options)
        return (out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout))


def assert_unaffected(clean, got):
    """Equal up to rounding: the CPU sums in another order where it has to step over NaN."""
    tolerance = 2**-6 if got.dtype == torch.bfloat16 else 2**-16
    torch.testing.assert_close(got, clean, rtol=tolerance, atol=tolerance)


def padding(device, lengths=(50, 64)):
    keep = torch.arange(SIZE_K, device=device) < torch.tensor(lengths, device=device)[:, None]
    return keep[:, None, None, :]


@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("kind", ["mask", "bias", "softcap"])
@pytest.mark.parametrize("dim", [64, 192, 256])
def test_padded_keys_do_not_leak(backend, poisoned, make, dim, kind, bad):
    """Keys that a column mask hides from every row may hold anything, in K and in V."""
    q, k, v, dout = make(dim)
    keep = padding(backend.device)
    options = {"mask": keep}
    if kind == "softcap":  # of NaN, its slope is NaN
        options["softcap"] = 5.0
    if kind == "bias":
        zeros = torch.zeros_like(keep, dtype=q.dtype)
        options = {"bias": zeros.masked_fill(~keep, -INF)}
    clean = forward_backward(backend, poisoned, q, k, v, dout, **options)
    hidden = ~keep[:, :, 0, :, None].expand_as(k)
    dirty = forward_backward(backend, poisoned, q, k.masked_fill(hidden, bad),
                             v.masked_fill(hidden, bad), dout, **options)  # fmt: skip
    for a, b in zip(clean, dirty, strict=True):
        assert_unaffected(a, b)
    assert (dirty[3][hidden] == 0).all() and (dirty[4][hidden] == 0).all()
    if kind == "bias":
        assert (dirty[5][~keep] == 0).all()


@pytest.mark.parametrize("bad", [NAN, INF], ids=str)
@pytest.mark.parametrize("kind", ["left", "both", "holes", "dropout"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_keys_left_out_anywhere_do_not_leak(backend, poisoned, make, dim, kind, bad):
    q, k, v, _ = make(dim)
    key = torch.arange(SIZE_K, device=backend.device)
    keep = (key >= 37) & (key < (SIZE_K if kind == "left" else 71))
    if kind == "holes":
        keep &= key % 3 != 0
    keep = keep.expand(1, HEADS, 1, SIZE_K).clone()
    keep[:, 1] = False  # nothing at all
    hidden = ~keep[:, :, 0, :, None].expand_as(k)
    options = {"mask": keep, "scale": dim**-0.5}
    if kind == "dropout":
        rng_state = torch.tensor([7, 9], device=backend.device)
        options |= {"dropout_p": 0.2, "rng_state": rng_state}
    clean = backend.attention(q, k, v, **options)
    with poisoned():
        out, lse = backend.attention(
            q, k.masked_fill(hidden, bad), v.masked_fill(hidden, bad), **options
        )
    assert_unaffected(clean[0], out)
    assert_unaffected(clean[1], lse)
    assert (out[:, 1] == 0).all() and (lse[:, 1] == -INF).all()


@pytest.mark.parametrize("bad", [NAN, INF], ids=str)
@pytest.mark.parametrize("kind", ["mask", "causal", "sink"])
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_empty_rows_beside_bad_values(backend, poisoned, make, dim, kind, bad):
    """A row without a key is 0, whatever the values hold that other rows attend."""
    q, k, v, _ = make(dim)
    v[:] = bad
    if kind == "mask":
        keep = torch.ones(1, 1, SIZE_Q, SIZE_K, dtype=torch.bool, device=backend.device)
        keep[:, :, 23] = False
        empty = torch.arange(SIZE_Q) == 23
        options = {"mask": keep}
    else:  # the first rows see nothing
        options = {"window_right": 0, "bottom_right": True}
        k, v = k[:, :, :40], v[:, :, :40]
        empty = torch.arange(SIZE_Q) < SIZE_Q - 40
    if kind == "sink":
        options["sink"] = torch.full((HEADS,), 0.5, device=backend.device)
    with poisoned():
        out, lse = backend.attention(q, k, v, **options)
    assert (out[:, :, empty] == 0).all()
    assert (lse[:, :, empty] == (0.5 if kind == "sink" else -INF)).all()
    assert not out[:, :, ~empty].isfinite().any() and lse[:, :, ~empty].isfinite().all()


MASKS = {
    "causal": {"window_right": 0},
    "window": {"window_left": 5, "window_right": 9},
    "mask": {"mask": "random"},
    "bias": {"bias": "random"},
}


@pytest.mark.parametrize("name", MASKS)
def test_masked_pairs_do_not_leak_on_cpu(backend, poisoned, make, name):
    """A NaN in one key, value, query and row of dout reaches only rows and keys that meet it."""
    if backend.name != "cpu":
        pytest.skip("tensor cores multiply masked pairs by zero")
    q, k, v, dout = make()
    options = dict(MASKS[name])
    i, j = torch.arange(SIZE_Q)[:, None], torch.arange(SIZE_K)
    keep = torch.ones(SIZE_Q, SIZE_K, dtype=torch.bool)
    keep &= j <= i + options.get("window_right", SIZE_K)
    keep &= j >= i - options.get("window_left", SIZE_Q)
    if options.get(name) == "random":
        keep &= torch.rand(SIZE_Q, SIZE_K) < 0.5
        float_mask = torch.zeros(1, 1, SIZE_Q, SIZE_K, dtype=q.dtype).masked_fill(~keep, -INF)
        options[name] = keep[None, None] if name == "mask" else float_mask
    clean = forward_backward(backend, poisoned, q, k, v, dout, **options)
    key, row = 41, 23
    meets_key, meets_row = keep[:, key], keep[row]
    k[:, :, key], v[:, :, key] = NAN, INF
    got = forward_backward(backend, poisoned, q, k, v, dout, **options)
    for index in (0, 1, 2):
        assert_unaffected(clean[index][:, :, ~meets_key], got[index][:, :, ~meets_key])
    assert got[0][:, :, meets_key].isnan().all() and got[1][:, :, meets_key].isnan().all()

    q, k, v, dout = make()
    clean = forward_backward(backend, poisoned, q, k, v, dout, **options)
    q[:, :, row], dout[:, :, row] = NAN, NAN
    got = forward_backward(backend, poisoned, q, k, v, dout, **options)
    others = torch.arange(SIZE_Q) != row
    for index in (0, 1, 2):
        assert_unaffected(clean[index][:, :, others], got[index][:, :, others])
    for index in (3, 4):
        assert_unaffected(clean[index][:, :, ~meets_row], got[index][:, :, ~meets_row])
        assert got[index][:, :, meets_row].isnan().all()


@pytest.mark.parametrize("bad", [NAN, INF], ids=str)
def test_attended_query(backend, poisoned, make, bad):
    q, k, v, dout = make()
    clean = forward_backward(backend, poisoned, q, k, v, dout)
    q[1, 2, 17, 5] = bad
    out, lse, dq, dk, dv = forward_backward(backend, poisoned, q, k, v, dout)
    assert out[1, 2, 17].isnan().all() and lse[1, 2, 17].isnan()
    others = torch.ones(BATCH, HEADS, SIZE_Q, dtype=torch.bool)
    others[1, 2, 17] = False
    for index, got in ((0, out), (1, lse)):
        if backend.name.startswith("sm"):  # a tile with such a row takes the longer exponent
            assert_unaffected(clean[index][others], got[others])
        else:
            assert equal_bits(clean[index][others], got[others])
    assert dq[1, 2, 17].isnan().all() and dk[1, 2].isnan().all() and dv[1, 2].isnan().all()
    assert equal_bits(clean[3][:1], dk[:1]) and equal_bits(clean[4][1, :2], dv[1, :2])


def test_attended_key(backend, poisoned, make):
    q, k, v, dout = make()
    k[0, 1, 33, 7] = NAN
    out, lse, *_ = forward_backward(backend, poisoned, q, k, v, dout)
    assert out[0, 1].isnan().all() and lse[0, 1].isnan().all()
    assert out[1].isfinite().all() and out[0, 0].isfinite().all() and lse[1].isfinite().all()


def test_attended_value(backend, poisoned, make):
    """Only the columns that hold NaN; lse is finite."""
    q, k, v, dout = make()
    v[0, 1, 33, 7] = NAN
    out, lse, *_ = forward_backward(backend, poisoned, q, k, v, dout)
    assert out[0, 1, :, 7].isnan().all() and lse.isfinite().all()
    others = torch.arange(DIM) != 7
    assert out[..., others].isfinite().all() and out[1].isfinite().all()


def test_attended_bias(backend, poisoned, make):
    q, k, v, dout = make()
    bias = torch.randn(1, HEADS, SIZE_Q, SIZE_K, dtype=q.dtype, device=backend.device)
    bias[0, 1, 20, 80] = NAN
    out, lse, dq, *_ = forward_backward(backend, poisoned, q, k, v, dout, bias=bias)
    assert out[:, 1, 20].isnan().all() and lse[:, 1, 20].isnan().all()
    assert dq[:, 1, 20].isnan().all()
    others = torch.arange(SIZE_Q) != 20
    assert out[:, :, others].isfinite().all() and lse[:, :, others].isfinite().all()
    assert dq[:, :, others].isfinite().all()


def test_nothing_but_nan(backend, poisoned, make):
    """A row of NaN scores is not an empty row, beside masked keys neither."""
    q, k, v, dout = make()
    q[:] = NAN
    for options in ({}, {"mask": padding(backend.device, (1, 2))}, {"window_right": 0}):
        out, lse, *_ = forward_backward(backend, poisoned, q, k, v, dout, **options)
        assert out.isnan().all() and lse.isnan().all()


def test_infinite_scores(backend, poisoned, make):
    """+inf makes the row NaN, -inf weighs nothing."""
    q, k, v, dout = make()
    q, k = q.abs() + 0.1, k.abs()
    k[0, 0, 11, 3] = INF
    k[1, 1, 11, 3] = -INF
    out, lse, *_ = forward_backward(backend, poisoned, q, k, v, dout)
    assert out[0, 0].isnan().all() and lse[0, 0].isnan().all()
    keep = torch.ones(BATCH, HEADS, 1, SIZE_K, dtype=torch.bool, device=backend.device)
    keep[1, 1, :, 11] = False
    expected, expected_lse, *_ = forward_backward(backend, poisoned, q, k, v, dout, mask=keep)
    # On tensor cores a tile with such a row takes the longer exponent.
    close = assert_unaffected if backend.name.startswith("sm") else torch.testing.assert_close
    close(out[1, 1], expected[1, 1])
    close(lse[1, 1], expected_lse[1, 1])


@pytest.mark.parametrize("equal", [True, False])
def test_huge_scores(backend, poisoned, equal):
    """Scores near 1e11, equal or one largest per row: the mean, or the value of the largest. lse
    has no digits left there, so of the gradients it is only asked that they are finite."""
    shape = (1, 2, 70, DIM)
    q = torch.full(shape, 133120.0, dtype=torch.bfloat16, device=backend.device)
    k, v, dout = q.clone(), torch.randn_like(q), torch.randn_like(q)
    if not equal:
        k[:, :, 1:] *= -torch.rand_like(k[:, :, 1:])
    out, lse, *grads = forward_backward(backend, poisoned, q, k, v, dout)
    expected = v.double().mean(2, keepdim=True) if equal else v[:, :, :1].double()
    torch.testing.assert_close(out.double(), expected.expand(shape), rtol=2**-7, atol=2**-7)
    assert lse.isfinite().all()
    for name, grad in zip("qkv", grads, strict=True):
        assert grad.isfinite().all(), f"d{name}"


def test_rows_of_the_lowest_number(backend, poisoned, make):
    """A bias of finfo.min everywhere is not an empty row: the mean. lse has no digits left."""
    q, k, v, dout = make()
    bias = torch.full((1, 1, 1, SIZE_K), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device)
    out, lse, *grads = forward_backward(backend, poisoned, q, k, v, dout, bias=bias)
    mean = v.double().mean(2, keepdim=True).expand_as(out)
    torch.testing.assert_close(out.double(), mean, rtol=2**-7, atol=2**-7)
    assert lse.isfinite().all() and all(grad.isfinite().all() for grad in grads)


def test_overflow_is_that_of_a_cast(backend, poisoned):
    """float16 results beyond 65504 are infinite, not NaN; lse is finite."""

    def make(value, rows=64):
        return torch.full((1, 1, rows, DIM), value, dtype=torch.float16, device=backend.device)

    same_key = [make(0.0), make(0.0), make(1.0), make(60000.0)]
    out, lse, dq, _, dv = forward_backward(
        backend, poisoned, *same_key, window_left=0, window_right=0
    )
    assert (out == 1).all() and (lse == 0).all() and (dv == 60000).all() and (dq == 0).all()
    one_key = [make(0.0), make(0.0, 1), make(1.0, 1), make(60000.0)]
    out, lse, _, _, dv = forward_backward(backend, poisoned, *one_key)
    assert (out == 1).all() and lse.isfinite().all() and (dv == INF).all()


def test_scale_zero(backend, poisoned, make):
    """The mean over what is kept; lse is the logarithm of the count; dq and dk are 0."""
    q, k, v, dout = make()
    keep = padding(backend.device)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with poisoned():
        out, lse = backend.attention(*leaves, mask=keep, scale=0.0)
        dq, dk, _ = torch.autograd.grad(out, leaves, dout)
    for b, count in enumerate((50, 64)):
        mean = v[b, :, :count].double().mean(1, keepdim=True).expand(-1, SIZE_Q, -1)
        torch.testing.assert_close(out[b].double(), mean, rtol=2**-7, atol=2**-7)
        assert (lse[b] - math.log(count)).abs().max() < 1e-5
    assert (dq == 0).all() and (dk == 0).all()
