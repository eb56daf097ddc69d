# SPDX-License-Identifier: BSD-3-Clause
"""The operators as torch sees them: schemas, fake kernels, autograd, autocast, torch.func, and
torch's own samples."""

import dataclasses

import pytest
import torch
from cases import BY_NAME
from inputs import make_inputs
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db

import flash_attn

ops = torch.ops.flash_attn
sdpa = flash_attn.scaled_dot_product_attention
OPCHECK = ["square", "gqa_bias_sink_slopes", "mask_padding", "bias_float32", "packed_features",
           "layout_lbhd_causal", "layout_expanded", "dropout", "no_queries"]  # fmt: skip


def small(name, dtype="float32"):
    case = dataclasses.replace(BY_NAME[name], head_dim=8)
    if case.seqlen_q > 20:
        case = dataclasses.replace(case, seqlen_q=12, seqlen_k=16)
    return make_inputs(case, dtype)


def with_gradients(inputs):
    leaves = {n: inputs.tensors[n].detach().requires_grad_() for n in inputs.differentiable()}
    return inputs.tensors | leaves


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck_attention(name, grad):
    inputs = small(name, "bfloat16" if name == "bias_float32" else "float32")
    tensors = with_gradients(inputs) if grad else inputs.tensors
    torch.library.opcheck(ops.attention.default, (), tensors | inputs.options)


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck_raw_operators(name):
    inputs = small(name, "bfloat16" if name == "bias_float32" else "float32")
    torch.library.opcheck(ops._fwd.default, (), inputs.tensors | inputs.options)
    out, lse = inputs.call(ops._fwd)
    t, o = inputs.tensors, inputs.options
    arguments = {a.name: t.get(a.name, o.get(a.name, a.default_value))
                 for a in ops._fwd.default._schema.arguments}  # fmt: skip
    needs = [name in t for name in ("q", "k", "v", "bias", "alibi_slopes", "sink")]
    more = {"dout": inputs.dout, "dlse": inputs.dlse, "out": out, "lse": lse}
    more |= {"deterministic": False, "needs": needs}
    torch.library.opcheck(ops._bwd.default, (), arguments | more)


@pytest.mark.parametrize("joins_q", [True, False])
def test_opcheck_joint(joins_q):
    """The raw operator where a part has no gradient, too."""
    joint = torch.randn(2, 6, 3 if joins_q else 2, 2, 8, requires_grad=True)
    q = None if joins_q else torch.randn(2, 4, 5, 8, requires_grad=True)
    bias = torch.randn(1, 1, 6 if joins_q else 5, 6, requires_grad=True)
    torch.library.opcheck(ops.attention_joint.default, (q, joint), {"bias": bias, "softcap": 2.0})
    out, lse = (t.detach() for t in ops.attention_joint(q, joint, bias=bias, softcap=2.0))
    values = {"q": q, "joint": joint, "bias": bias, "softcap": 2.0}
    arguments = {
        a.name: values.get(a.name, a.default_value)
        for a in ops.attention_joint.default._schema.arguments
    }
    arguments = {n: t.detach() if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    arguments |= {"dout": torch.randn_like(out), "dlse": None, "out": out, "lse": lse}
    for needs in ([True] * 6, [False, True, True, False, False, False], [True] + [False] * 5):
        torch.library.opcheck(ops._bwd_joint.default, (), arguments | {"needs": needs})


def test_opcheck_others():
    q, k, v = (torch.randn(2, 3, 6, 8, requires_grad=True) for _ in range(3))
    mask = torch.randn(6, 6, requires_grad=True)
    torch.library.opcheck(ops.sdpa.default, (q, k, v, mask))
    torch.library.opcheck(ops.sdpa.default, (q[0], k, v), {"is_causal": True, "scale": 0.3})
    torch.library.opcheck(ops.rng_state.default, (q, 8),
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip
    lse = ops.attention(q, k, v)[1].detach().requires_grad_()
    torch.library.opcheck(ops.attention_weights.default, (q, k, lse))
    torch.library.opcheck(ops.attention_weights.default, (q, k, lse), {"average": False})


META = ["square", "gqa", "layout_blhd", "layout_lbhd_causal", "layout_sliced", "layout_expanded",
        "head_dim_192_v_128", "packed", "no_queries", "no_keys", "no_head_dim_v"]  # fmt: skip


@pytest.mark.parametrize("name", META)
def test_strides_of_meta_tensors(name):
    inputs = make_inputs(BY_NAME[name], "float32")

    def to_meta(t):
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    meta = dataclasses.replace(inputs, tensors={n: to_meta(t) for n, t in inputs.tensors.items()})
    for real, fake in zip(inputs.call(ops._fwd), meta.call(ops._fwd), strict=True):
        assert real.shape == fake.shape and real.dtype == fake.dtype
        assert real.stride() == fake.stride() or real.numel() == 0


GRADCHECK = ["square", "gqa_bias_sink_slopes", "softcap", "causal_bottom_right_tall", "window",
             "prefix_causal", "bias_heads", "bias_keys", "mask_empty_rows", "sink_empty_rows",
             "dropout", "packed_causal", "all_features", "scale_negative"]  # fmt: skip


@pytest.mark.parametrize("name", GRADCHECK)
def test_gradcheck(name):
    case = dataclasses.replace(BY_NAME[name], head_dim=3, head_dim_v=2)
    if case.lengths_q:
        case = dataclasses.replace(case, lengths_q=(3, 0, 5), lengths_k=(4, 2, 3))
    else:
        case = dataclasses.replace(case, batch=1, seqlen_q=5, seqlen_k=4)
    inputs = make_inputs(case, "float64")
    names = inputs.differentiable()

    def function(*leaves):
        tensors = inputs.tensors | dict(zip(names, leaves, strict=True))
        out, lse = ops.attention(**tensors, **inputs.options)
        return out, torch.where(lse.isinf(), 0, lse)

    leaves = tuple(inputs.tensors[n].detach().clone().requires_grad_() for n in names)
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("average", [True, False])
def test_gradcheck_of_weights(average):
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    q, k, bias = make(2, 4, 5, 3), make(2, 2, 6, 3), make(1, 4, 1, 6)
    mask = torch.rand(2, 1, 5, 6) < 0.7
    mask[:, :, 2] = False

    def function(q, k, bias):
        _, lse = ops.attention(q, k, k, bias=bias, mask=mask, scale=0.6)
        return ops.attention_weights(q, k, lse, bias=bias, mask=mask, scale=0.6, average=average)

    assert torch.autograd.gradcheck(function, (q, k, bias))
    weights = function(q, k, bias)
    keep = mask.any(-1, keepdim=True).squeeze(1).expand(2, 5, 1)
    sums = weights.sum(-1, keepdim=True) if average else weights.mean(1).sum(-1, keepdim=True)
    torch.testing.assert_close(sums, keep.double())


def test_no_graph_where_nothing_needs_one():
    q = torch.randn(1, 2, 4, 8)
    assert not ops.attention(q, q, q)[0].requires_grad
    leaf = q.clone().requires_grad_()
    with torch.no_grad():
        assert not ops.attention(leaf, q, q)[0].requires_grad
    out, lse = ops.attention(leaf, q, q)
    assert out.requires_grad and lse.requires_grad


def test_saved_tensors_are_checked():
    """A tensor changed in place between forward and backward is noticed."""
    q, k, v = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3))
    x = q * 1
    out = sdpa(x, k, v)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_backward_twice_needs_retain_graph():
    q, k, v = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3))
    out = sdpa(q, k, v, dropout_p=0.3)
    first = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    second = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), q)


def test_autocast():
    q, k, v = (torch.randn(2, 3, 8, 16, requires_grad=True) for _ in range(3))
    mask = torch.randn(8, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sdpa(q, k.half(), v.bfloat16(), mask)
        assert out.dtype == torch.bfloat16
        out_func, lse = ops.attention(q, k, v)
        assert out_func.dtype == torch.bfloat16 and lse.dtype == torch.float32
        double = [t.double() for t in (q, k, v)]
        assert sdpa(*double).dtype == torch.float64
        keep = torch.rand(8, 8) < 0.8
        assert sdpa(q, k, v, keep).dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().sum(), (q, k, v, mask))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
    expected = sdpa(*(t.bfloat16() for t in (q, k, v, mask)))
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)


def formula(q, k, v, mask=None):
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return torch.softmax(scores if mask is None else scores + mask, -1) @ v


def functorch_inputs():
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    return make(4, 2, 3, 5, 8), make(4, 2, 3, 7, 8), make(4, 2, 3, 7, 6), make(4, 1, 5, 7)


@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (0, None, None, None), (None, 0, 0, None),
                                     (2, 0, 1, 0), (None, None, None, 0)], ids=str)  # fmt: skip
def test_vmap(in_dims):
    inputs = functorch_inputs()
    moved = [x[0] if d is None else x.movedim(0, d) for x, d in zip(inputs, in_dims, strict=True)]
    ours = torch.func.vmap(sdpa, in_dims)(*moved)
    torch.testing.assert_close(ours, torch.func.vmap(formula, in_dims)(*moved))
    ours = torch.func.vmap(lambda *x: sdpa(*x, is_causal=True), in_dims[:3] if any(
        d is not None for d in in_dims[:3]) else (0, None, None))(
        *(moved[:3] if any(d is not None for d in in_dims[:3]) else (inputs[0], *moved[1:3]))
    )  # fmt: skip
    assert ours.isfinite().all()


def test_grad_vjp_jacrev():
    q, k, v, mask = (x[0, 0] for x in functorch_inputs())
    mask = mask[0]
    for function in (sdpa, formula):
        function.loss = lambda *x, f=function: f(*x).square().sum()
    ours = torch.func.grad(sdpa.loss, (0, 1, 2, 3))(q, k, v, mask)
    theirs = torch.func.grad(formula.loss, (0, 1, 2, 3))(q, k, v, mask)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    out, pull = torch.func.vjp(sdpa, q, k, v)
    expected, pull_formula = torch.func.vjp(formula, q, k, v)
    for a, b in zip(pull(out), pull_formula(expected), strict=True):
        torch.testing.assert_close(a, b)
    for index in range(3):
        torch.testing.assert_close(
            torch.func.jacrev(sdpa, index)(q, k, v), torch.func.jacrev(formula, index)(q, k, v)
        )


def test_vmap_of_grad():
    inputs = functorch_inputs()[:3]
    ours = torch.func.vmap(torch.func.grad(lambda *x: sdpa(*x).square().sum(), (0, 1, 2)))(*inputs)
    theirs = torch.func.vmap(
        torch.func.grad(lambda *x: formula(*x).square().sum(), (0, 1, 2))
    )(*inputs)  # fmt: skip
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_vmap_randomness():
    q = torch.randn(3, 2, 2, 16, 8)
    drop = lambda x: sdpa(x, x, x, dropout_p=0.5)  # noqa: E731
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(drop)(q)
    same = torch.func.vmap(drop, randomness="same")(q[:1].expand_as(q))
    assert torch.equal(same[0], same[1])
    different = torch.func.vmap(drop, randomness="different")(q[:1].expand_as(q))
    assert not torch.equal(different[0], different[1])


class Logged(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


def test_torch_function_modes_come_back_to_us():
    q = torch.randn(1, 2, 4, 8)
    with Logged() as mode:
        out = sdpa(q, q, q)
    assert sdpa in mode.calls and torch.equal(out, sdpa(q, q, q))
    with torch.device("cpu"):
        assert torch.equal(sdpa(q, q, q), out)


def test_plain_subclasses():
    class Named(torch.Tensor):
        pass

    q = torch.randn(1, 2, 4, 8)
    out = sdpa(q.as_subclass(Named), q, q)
    assert isinstance(out, Named) and torch.equal(out.as_subclass(torch.Tensor), sdpa(q, q, q))


def test_sdpa_patch():
    before = F.scaled_dot_product_attention
    q = torch.randn(1, 2, 4, 8)
    with flash_attn.sdpa_patch():
        assert F.scaled_dot_product_attention is sdpa
        with flash_attn.sdpa_patch():
            assert F.scaled_dot_product_attention is sdpa
        assert torch.equal(F.scaled_dot_product_attention(q, q, q), sdpa(q, q, q))
    assert F.scaled_dot_product_attention is before
    flash_attn.enable_sdpa_patch()
    assert F.scaled_dot_product_attention is sdpa
    flash_attn.disable_sdpa_patch()
    assert F.scaled_dot_product_attention is before
    with pytest.raises(RuntimeError, match="disable_sdpa_patch"):
        flash_attn.disable_sdpa_patch()


SDPA_INFO = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_samples_of_torch(dtype):
    """torch's own OpInfo samples, against its MATH backend in float64, gradients too."""
    count = 0
    for sample in SDPA_INFO.sample_inputs("cpu", dtype, requires_grad=True):
        if sample.kwargs.get("dropout_p"):
            continue
        args = (sample.input, *sample.args)
        out = sdpa(*args, **sample.kwargs)
        exact = [t.detach().double().requires_grad_() for t in args]
        kwargs = {k: t.double() if torch.is_tensor(t) and t.is_floating_point() else t
                  for k, t in sample.kwargs.items()}  # fmt: skip
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            expected = F.scaled_dot_product_attention(*exact, **kwargs)
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.08}[dtype]
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        grads = torch.autograd.grad(out, args, torch.ones_like(out))
        for a, b in zip(grads, torch.autograd.grad(expected, exact, torch.ones_like(expected)),
                        strict=True):  # fmt: skip
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=4 * tolerance)
        count += 1
    assert count >= 10
