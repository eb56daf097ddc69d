# SPDX-License-Identifier: BSD-3-Clause
"""flash_attn_func, its packed and its variable-length relatives: FlashAttention-2's signatures and
meaning."""

import inspect
import math

import pytest
import torch

from flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    reference,
)

COMMON = [("dropout_p", 0.0), ("softmax_scale", None), ("causal", False), ("window_size", (-1, -1)),
          ("softcap", 0.0), ("alibi_slopes", None), ("deterministic", False),
          ("return_attn_probs", False)]  # fmt: skip


def make(*shape, dtype=torch.float64, grad=True):
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


def dense(size_q=17, size_k=23, heads=4, heads_k=2, dim=8, dim_v=8):
    return (
        make(2, size_q, heads, dim),
        make(2, size_k, heads_k, dim),
        make(2, size_k, heads_k, dim_v),
    )


def test_signatures():
    def positional(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    empty = inspect.Parameter.empty
    tensors = [("q", empty), ("k", empty), ("v", empty)]
    assert positional(flash_attn_func) == tensors + COMMON
    bounds = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    names = tensors + [(name, empty) for name in bounds]
    assert positional(flash_attn_varlen_func) == [*names, *COMMON, ("block_table", None)]

    def required(*names):
        return [(name, empty) for name in names] + COMMON

    assert positional(flash_attn_qkvpacked_func) == required("qkv")
    assert positional(flash_attn_kvpacked_func) == required("q", "kv")
    assert positional(flash_attn_varlen_qkvpacked_func) == required(
        "qkv", "cu_seqlens", "max_seqlen"
    )
    assert positional(flash_attn_varlen_kvpacked_func) == required("q", "kv", *bounds)


def meaning(q, k, v, causal=False, window_size=(-1, -1), softmax_scale=None, softcap=0.0,
            alibi_slopes=None, **more):  # fmt: skip
    """The same by the reference, (batch, length, heads, dim)."""
    left, right = (None if x < 0 else int(x) for x in window_size)
    out, lse = reference.attention(
        *(t.transpose(1, 2) for t in (q, k, v)), alibi_slopes=alibi_slopes, bottom_right=True,
        window_left=left, window_right=0 if causal else right, softcap=softcap,
        scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, **more,
    )  # fmt: skip
    return out.transpose(1, 2), lse


OPTIONS = [
    {}, {"causal": True}, {"softmax_scale": 0.3}, {"softmax_scale": -0.2}, {"softcap": 3.0},
    {"window_size": (5, 2)}, {"window_size": (0, 0)}, {"window_size": (-1, 3)},
    {"window_size": (4, -1)}, {"window_size": [6, 0], "causal": True},
    {"window_size": torch.tensor([3, 1])}, {"window_size": (30, 30)},
    {"causal": True, "softcap": 2.0, "window_size": (9, -1)},
]  # fmt: skip


def name_of(options):
    return " ".join(f"{key}={value}" for key, value in options.items()) or "plain"


@pytest.mark.parametrize("sizes", [(17, 23), (23, 17), (16, 16), (1, 40), (40, 3)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_dense(options, sizes):
    q, k, v = dense(*sizes)
    out, (expected, _) = flash_attn_func(q, k, v, **options), meaning(q, k, v, **options)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), grad),
                    torch.autograd.grad(expected, (q, k, v), grad), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_slopes(causal, per_batch):
    q, k, v = dense(13, 20)
    slopes = torch.rand((2, 4) if per_batch else (4,), dtype=torch.float32)
    out = flash_attn_func(q, k, v, causal=causal, alibi_slopes=slopes)
    expected, _ = meaning(q, k, v, causal=causal, alibi_slopes=slopes)
    torch.testing.assert_close(out, expected)


def test_probabilities():
    """(out, lse, S_dmask): lse has its gradient; a row that sees nothing -inf."""
    q, k, v = dense(23, 17)
    out, lse, mask = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    expected, expected_lse = meaning(q, k, v, causal=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert lse.shape == (2, 4, 23) and (lse[:, :, :6] == -math.inf).all()
    assert (out[:, :6] == 0).all() and mask is not None
    finite, expected_finite = lse[:, :, 6:].sum(), expected_lse[:, :, 6:].sum()
    for a, b in zip(torch.autograd.grad(finite, (q, k)),
                    torch.autograd.grad(expected_finite, (q, k)), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_dropout_is_drawn():
    q, k, v = (make(2, 64, 4, 8, dtype=torch.float32) for _ in range(3))
    torch.manual_seed(2)
    first, second = flash_attn_func(q, k, v, 0.5), flash_attn_func(q, k, v, 0.5)
    torch.manual_seed(2)
    assert torch.equal(flash_attn_func(q, k, v, 0.5), first) and not torch.equal(first, second)
    with_softcap = flash_attn_func(q, k, v, 0.5, softcap=3.0)
    assert with_softcap.isfinite().all()


LENGTHS_Q, LENGTHS_K = (5, 0, 17, 9), (9, 4, 17, 3)


def ends(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_packed(options):
    q, k, v = make(31, 4, 8), make(33, 2, 8), make(33, 2, 6)
    grad = torch.randn(31, 4, 6, dtype=torch.float64)
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, ends(LENGTHS_Q), ends(LENGTHS_K), 17, 17, return_attn_probs=True, **options
    )
    grads = torch.autograd.grad(out, (q, k, v), grad)
    assert lse.shape == (4, 31)
    for b in range(4):
        rows = slice(sum(LENGTHS_Q[:b]), sum(LENGTHS_Q[: b + 1]))
        keys = slice(sum(LENGTHS_K[:b]), sum(LENGTHS_K[: b + 1]))
        expected, expected_lse = meaning(q[rows][None], k[keys][None], v[keys][None], **options)
        torch.testing.assert_close(out[rows], expected[0])
        torch.testing.assert_close(lse[:, rows], expected_lse[0])
        wanted = torch.autograd.grad(expected[0], (q, k, v), grad[rows])
        for got, want, part in zip(grads, wanted, (rows, keys, keys), strict=True):
            torch.testing.assert_close(got[part], want[part])


def joint_calls(options):
    """{name: (function of the joint tensors, the same of their slices, the joint tensors)}"""
    lengths = ends(LENGTHS_Q)
    q_ends, k_ends = ends(LENGTHS_Q), ends(LENGTHS_K)
    return {
        "qkvpacked": (
            lambda qkv: flash_attn_qkvpacked_func(qkv, **options),
            lambda qkv: flash_attn_func(*qkv.unbind(2), **options),
            (make(2, 17, 3, 4, 8),),
        ),
        "kvpacked": (
            lambda q, kv: flash_attn_kvpacked_func(q, kv, **options),
            lambda q, kv: flash_attn_func(q, *kv.unbind(2), **options),
            (make(2, 17, 4, 8), make(2, 23, 2, 2, 8)),
        ),
        "varlen_qkvpacked": (
            lambda qkv: flash_attn_varlen_qkvpacked_func(qkv, lengths, 17, **options),
            lambda qkv: flash_attn_varlen_func(*qkv.unbind(1), lengths, lengths, 17, 17, **options),
            (make(31, 3, 4, 8),),
        ),
        "varlen_kvpacked": (
            lambda q, kv: flash_attn_varlen_kvpacked_func(q, kv, q_ends, k_ends, 17, 17, **options),
            lambda q, kv: flash_attn_varlen_func(
                q, *kv.unbind(1), q_ends, k_ends, 17, 17, **options
            ),
            (make(31, 4, 8), make(33, 2, 2, 8)),
        ),
    }


JOINT = ["qkvpacked", "kvpacked", "varlen_qkvpacked", "varlen_kvpacked"]


@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "softcap": 3.0}, {"window_size": (5, 2)}, {"dropout_p": 0.4}],
    ids=name_of,
)  # fmt: skip
def test_joint_is_bitwise_what_its_parts_give(name, options):
    joint, parts, tensors = joint_calls(options | {"return_attn_probs": True})[name]
    torch.manual_seed(5)
    results = joint(*tensors)
    torch.manual_seed(5)
    expected = parts(*tensors)
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)
    (out, lse, _), (expected, expected_lse, _) = results, expected
    seen = lse.isfinite()
    grads = torch.randn_like(out), torch.randn_like(lse) * seen
    got = torch.autograd.grad((out, lse), tensors, grads)
    wanted = torch.autograd.grad((expected, expected_lse), tensors, grads)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("name", JOINT)
def test_gradient_of_joint_is_not_gathered(name):
    """One operator writes it, and nothing stacks the gradients of the parts."""
    joint, parts, tensors = joint_calls({"causal": True})[name]

    def operators_of_backward(function):
        loss = function(*tensors).sum()
        with torch.profiler.profile() as profile:
            grads = torch.autograd.grad(loss, tensors)
        assert all(grad.is_contiguous() for grad in grads)
        return {event.key for event in profile.key_averages()}

    gathering = {"aten::stack", "aten::cat"}
    assert gathering & operators_of_backward(parts)
    found = operators_of_backward(joint)
    assert "flash_attn::_bwd_joint" in found and not gathering & found


@pytest.mark.parametrize("frozen", [0, 1])
def test_kvpacked_with_a_frozen_side(frozen):
    joint, parts, tensors = joint_calls({})["kvpacked"]
    tensors[frozen].requires_grad_(False)
    leaf = tensors[1 - frozen]
    grads = [torch.autograd.grad(f(*tensors).square().sum(), leaf)[0] for f in (joint, parts)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("name", JOINT)
def test_joint_under_transforms_and_compile(name):
    joint, parts, tensors = joint_calls({"causal": True})[name]
    loss = lambda f: lambda *t: f(*t).square().sum()  # noqa: E731
    places = tuple(range(len(tensors)))
    for a, b in zip(torch.func.grad(loss(joint), places)(*tensors),
                    torch.func.grad(loss(parts), places)(*tensors), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()
    compiled = torch.compile(joint, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), parts(*tensors))
    for a, b in zip(torch.autograd.grad(loss(compiled)(*tensors), tensors),
                    torch.autograd.grad(loss(parts)(*tensors), tensors), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_joint_under_autocast():
    qkv = torch.randn(1, 9, 3, 2, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attn_qkvpacked_func(qkv)
    assert out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out.float().sum(), qkv)
    assert grad.dtype == torch.float32


def test_joint_errors():
    with pytest.raises(RuntimeError, match=r"expected qkv \(batch, seqlen, 3, heads, head_dim\)"):
        flash_attn_qkvpacked_func(make(2, 5, 2, 4, 8))
    with pytest.raises(RuntimeError, match=r"expected kv \(total, 2, heads, head_dim\), got"):
        flash_attn_varlen_kvpacked_func(
            make(31, 4, 8), make(33, 2, 8), ends(LENGTHS_Q), ends(LENGTHS_K), 17, 17
        )
    joint = torch.ops.flash_attn.attention_joint
    with pytest.raises(RuntimeError, match="expected joint of 3 parts, q, k and v, got 2"):
        joint(None, make(2, 5, 2, 4, 8))
    with pytest.raises(RuntimeError, match=r"expected joint .*got 3 dimensions"):
        joint(make(5, 4, 8), make(5, 4, 8))


def test_packed_bounds_as_tensors():
    """max_seqlen as 0-d tensors, int64 ends."""
    q, k, v = make(31, 4, 8), make(33, 2, 8), make(33, 2, 8)
    plain = flash_attn_varlen_func(q, k, v, ends(LENGTHS_Q), ends(LENGTHS_K), 17, 17)
    other = flash_attn_varlen_func(
        q, k, v, ends(LENGTHS_Q), ends(LENGTHS_K), torch.tensor(17), torch.tensor(17)
    )
    assert torch.equal(plain, other)


def test_layout_is_not_copied():
    q, k, v = dense()
    out = flash_attn_func(q, k, v)
    assert out.shape == q.shape and out.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes(dtype):
    q, k, v = (t.detach().to(dtype) for t in dense())
    out = flash_attn_func(q, k, v, causal=True)
    expected, _ = meaning(q.double(), k.double(), v.double(), causal=True)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)


def test_errors():
    q, k, v = dense()
    with pytest.raises(RuntimeError, match=r"expected q \(batch, seqlen, heads, head_dim\), got"):
        flash_attn_func(q[0, 0], k[0, 0], v[0, 0])
    with pytest.raises(RuntimeError, match=r"expected q \(batch, seqlen, heads, head_dim\), got"):
        flash_attn_kvpacked_func(q[0, 0], torch.stack((k, v), 2))
    with pytest.raises(RuntimeError, match="dtype"):
        flash_attn_func(q, k.float(), v)
    with pytest.raises(RuntimeError, match="heads"):
        flash_attn_func(q, k.repeat(1, 1, 3, 1)[:, :, :3], v)
    with pytest.raises((RuntimeError, ValueError), match=r"4|four|dim"):
        flash_attn_func(q[0], k[0], v[0])
    with pytest.raises((RuntimeError, ValueError, NotImplementedError), match="block_table"):
        flash_attn_varlen_func(q[0], k[0], v[0], ends((17,)), ends((23,)), 17, 23,
                               block_table=torch.zeros(1, 1, dtype=torch.int32))  # fmt: skip
