# SPDX-License-Identifier: BSD-3-Clause
"""flash_attn.nn.MultiheadAttention means what torch.nn.MultiheadAttention means, over all its
options; and takes its place in a model."""

import copy
import itertools
import re

import pytest
import torch
from torch import nn

import flash_attn
from flash_attn.nn import MultiheadAttention, replace_mha, restore_mha

EMBED, HEADS, BATCH, SIZE_Q, SIZE_K = 12, 3, 2, 5, 7


def pair(**options):
    """torch's module and ours with the same parameters, in float64."""
    theirs = nn.MultiheadAttention(EMBED, HEADS, dtype=torch.float64, **options)
    ours = MultiheadAttention(EMBED, HEADS, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.5)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def sequences(module, size_q=SIZE_Q, size_k=SIZE_K, batched=True):
    def make(size, dim):
        shape = [size, dim]
        if batched:
            shape = [BATCH, size, dim] if module.batch_first else [size, BATCH, dim]
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    return make(size_q, EMBED), make(size_k, module.kdim), make(size_k, module.vdim)


def assert_same(ours, theirs, inputs, valid=None, **options):
    """Outputs, weights, and the gradients of inputs and parameters."""
    results = []
    for module in (ours, theirs):
        out, weights = module(*inputs, **options)
        loss = (out * torch.arange(out.numel()).reshape(out.shape).sin()).sum()
        if weights is not None:
            loss = (
                loss + (weights * torch.arange(weights.numel()).reshape(weights.shape).cos()).sum()
            )
        leaves = [*dict.fromkeys(inputs), *module.parameters()]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append((out, weights, grads))
    (out, weights, grads), (their_out, their_weights, their_grads) = results
    torch.testing.assert_close(out, their_out)
    assert (weights is None) == (their_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, their_weights)
    for a, b in zip(grads, their_grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


OPTIONS = [
    {}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 8}, {"vdim": 10},
    {"kdim": 8, "vdim": 10, "bias": False}, {"kdim": 8, "vdim": 8, "add_bias_kv": True},
]  # fmt: skip


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mode", ["no weights", "averaged", "each head"])
def test_constructor_options(options, batch_first, mode):
    if mode != "no weights" and "vdim" in options and options.get("kdim") == options["vdim"]:
        pytest.skip("covered without weights")
    ours, theirs = pair(batch_first=batch_first, **options)
    weights = {"need_weights": mode != "no weights", "average_attn_weights": mode == "averaged"}
    assert_same(ours, theirs, sequences(theirs), **weights)
    padding = torch.zeros(BATCH, SIZE_K, dtype=torch.bool)
    padding[1, 4:] = True
    assert_same(ours, theirs, sequences(theirs), key_padding_mask=padding, **weights)


def masks(name, kind):
    if name is None:
        return None
    shape = {"padding": (BATCH, SIZE_K), "2d": (SIZE_Q, SIZE_K),
             "3d": (BATCH * HEADS, SIZE_Q, SIZE_K)}[name]  # fmt: skip
    forbidden = torch.rand(shape) < 0.4
    forbidden[..., 0] = False
    if kind == "bool":
        return forbidden
    if kind == "minus_inf":
        return torch.zeros(shape, dtype=torch.float64).masked_fill(forbidden, -torch.inf)
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float", "minus_inf"])
@pytest.mark.parametrize(("attn_mask", "padding"),
                         [("2d", None), ("3d", None), (None, "padding"), ("2d", "padding"),
                          ("3d", "padding")])  # fmt: skip
def test_masks(attn_mask, padding, kind, need_weights):
    for options in ({}, {"add_bias_kv": True, "add_zero_attn": True}):
        ours, theirs = pair(batch_first=True, **options)
        assert_same(ours, theirs, sequences(theirs), attn_mask=masks(attn_mask, kind),
                    key_padding_mask=masks(padding, kind), need_weights=need_weights)  # fmt: skip


def test_masks_of_two_kinds():
    ours, theirs = pair(batch_first=True)
    with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):
        assert_same(ours, theirs, sequences(theirs), attn_mask=masks("2d", "bool"),
                    key_padding_mask=masks("padding", "float"), need_weights=False)  # fmt: skip


@pytest.mark.parametrize("need_weights", [False, True])
def test_gradient_of_a_float_mask(need_weights):
    ours, theirs = pair(batch_first=True)
    inputs, mask = sequences(theirs), torch.randn(SIZE_Q, SIZE_K, dtype=torch.float64)
    grads = []
    for module in (ours, theirs):
        leaf = mask.clone().requires_grad_()
        out, _ = module(*inputs, attn_mask=leaf, need_weights=need_weights)
        grads.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_causal_hint(padded, need_weights):
    ours, theirs = pair(batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(SIZE_Q, dtype=torch.float64)
    padding = None
    if padded:
        padding = torch.zeros(BATCH, SIZE_Q, dtype=torch.float64)
        padding[1, 3:] = -torch.inf
    assert_same(ours, theirs, sequences(theirs, size_k=SIZE_Q), attn_mask=mask, is_causal=True,
                key_padding_mask=padding, need_weights=need_weights)  # fmt: skip


@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(batch_first):
    for need_weights, average in itertools.product((False, True), repeat=2):
        ours, theirs = pair(batch_first=batch_first)
        inputs = sequences(theirs, batched=False)
        padding = torch.tensor([False] * 5 + [True] * 2)
        weights = {"need_weights": need_weights, "average_attn_weights": average}
        assert_same(ours, theirs, inputs, key_padding_mask=padding, **weights)
        assert_same(ours, theirs, inputs, attn_mask=masks("2d", "bool"), **weights)


@pytest.mark.parametrize("batch_first", [False, True])
def test_self_attention(batch_first):
    ours, theirs = pair(batch_first=batch_first)
    x, *_ = sequences(theirs)
    assert_same(ours, theirs, (x, x, x), need_weights=False)
    y = sequences(theirs)[1]
    assert_same(ours, theirs, (x, y, y), need_weights=True)


def test_fully_masked_rows_are_zero():
    """Deliberately not torch's NaN."""
    ours, _ = pair(batch_first=True)
    mask = torch.zeros(SIZE_Q, SIZE_K, dtype=torch.bool)
    mask[2] = True
    inputs = sequences(ours)
    out, weights = ours(*inputs, attn_mask=mask)
    assert (weights[:, 2] == 0).all() and out.isfinite().all()
    torch.testing.assert_close(out[:, 2], ours.out_proj.bias.expand(BATCH, -1))
    grads = torch.autograd.grad(out.sum() + weights.sum(), inputs)
    assert all(g.isfinite().all() for g in grads) and (grads[0][:, 2] == 0).all()


def test_dropout():
    module = MultiheadAttention(16, 2, dropout=0.5, batch_first=True)
    x = torch.randn(2, 64, 16)
    torch.manual_seed(0)
    out, weights = module(x, x, x, average_attn_weights=False)
    torch.manual_seed(0)
    again, _ = module(x, x, x, average_attn_weights=False)
    assert torch.equal(out, again)
    fraction = (weights == 0).double().mean().item()
    assert abs(fraction - 0.5) < 0.05
    value = nn.functional.linear(x, module.in_proj_weight[32:], module.in_proj_bias[32:])
    value = value.unflatten(-1, (2, 8)).transpose(1, 2)
    expected = module.out_proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    module.eval()
    torch.testing.assert_close(module(x, x, x)[0], module(x, x, x)[0], rtol=0, atol=0)
    assert (module(x, x, x)[1] != 0).all()


def test_state_dict_and_class():
    for options in OPTIONS:
        ours, theirs = pair(**options)
        assert isinstance(ours, nn.MultiheadAttention)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
    copied = copy.deepcopy(ours)
    x = sequences(ours)
    torch.testing.assert_close(copied(*x)[0], ours(*x)[0])


ERRORS = [
    ("4-D", lambda m, q, k, v: m(q[None], k, v), AssertionError,
     "query should be unbatched 2D or batched 3D tensor but received 4-D query tensor"),
    ("ranks", lambda m, q, k, v: m(q, k[0], v), AssertionError,
     "For batched (3-D) `query`, expected `key` and `value` to be 3-D but found"),
    ("mask", lambda m, q, k, v: m(q, k, v, attn_mask=torch.zeros(4, 4)), RuntimeError,
     "The shape of the 2D attn_mask is torch.Size([4, 4]), but should be (5, 7)."),
    ("embedding", lambda m, q, k, v: m(q[..., :8], k, v), AssertionError,
     "was expecting embedding dimension of 12, but got 8"),
    ("integers", lambda m, q, k, v: m(q, k, v, attn_mask=torch.zeros(5, 7, dtype=torch.int64)),
     AssertionError, "only bool and floating types of attn_mask are supported"),
    ("padding of integers",
     lambda m, q, k, v: m(q, k, v, key_padding_mask=torch.zeros(2, 7, dtype=torch.int64)),
     AssertionError, "only bool and floating types of key_padding_mask are supported"),
    ("hint", lambda m, q, k, v: m(q, k, v, is_causal=True), RuntimeError,
     "Need attn_mask if specifying the is_causal hint."),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "text"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS]
)
def test_errors_are_those_of_torch(call, error, text):
    ours, theirs = pair(batch_first=True)
    inputs = sequences(theirs)
    for module in (ours, theirs):
        with pytest.raises(error, match=re.escape(text)):
            call(module, *inputs)


def test_constructor_errors():
    with pytest.raises(ValueError, match="embed_dim and num_heads must be greater than 0"):
        MultiheadAttention(0, 2)
    with pytest.raises(AssertionError, match="embed_dim must be divisible by num_heads"):
        MultiheadAttention(10, 3)


def calls_to_us(module, *args, **kwargs):
    """How many attention operators of ours a call runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.seen += str(func).startswith("flash_attn._fwd")
            return func(*args, **(kwargs or {}))

    with Count():
        out = module(*args, **kwargs)
    return Count.seen, out


def encoder(layers=2, **options):
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True,
                                       dtype=torch.float64, **options)  # fmt: skip
    return nn.TransformerEncoder(layer, layers)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder(training, padded, norm_first):
    """The same numbers with our modules in it, in training and, not bypassed, in inference."""
    model = encoder(norm_first=norm_first).train(training)
    x = torch.randn(3, 9, 16, dtype=torch.float64)
    padding = None
    if padded:
        padding = torch.zeros(3, 9, dtype=torch.bool)
        padding[0, 6:], padding[2, 2:] = True, True
    rows = slice(None) if padding is None else ~padding
    context = torch.enable_grad if training else torch.no_grad
    with context():
        expected = model(x, src_key_padding_mask=padding)
        assert replace_mha(model) is model
        count, out = calls_to_us(model, x, src_key_padding_mask=padding)
        assert count == 2
        torch.testing.assert_close(out[rows], expected[rows])
        restore_mha(model)
        count, again = calls_to_us(model, x, src_key_padding_mask=padding)
        assert count == 0
        torch.testing.assert_close(again[rows], expected[rows])


def test_encoder_causal():
    model = encoder()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    expected = model(x, mask=mask, is_causal=True)
    torch.testing.assert_close(replace_mha(model)(x, mask=mask, is_causal=True), expected)


def test_transformer_with_decoder():
    model = nn.Transformer(16, 4, 1, 1, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    source, target = (torch.randn(2, n, 16, dtype=torch.float64) for n in (9, 6))
    mask = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    expected = model(source, target, tgt_mask=mask, tgt_is_causal=True)
    replace_mha(model)
    count, out = calls_to_us(model, source, target, tgt_mask=mask, tgt_is_causal=True)
    assert count == 3
    torch.testing.assert_close(out, expected)


def test_replace_keeps_what_a_module_is():
    model = encoder()
    parameters = [id(p) for p in model.parameters()]
    seen = []
    hook = model.layers[0].self_attn.register_forward_pre_hook(lambda *a: seen.append(1))
    nested, count = model.use_nested_tensor, len(model.layers[0].self_attn._forward_pre_hooks)
    replace_mha(model)
    replace_mha(model)
    assert isinstance(model.layers[0].self_attn, MultiheadAttention)
    assert [id(p) for p in model.parameters()] == parameters
    copied = copy.deepcopy(model).eval()
    with torch.no_grad():
        assert calls_to_us(copied, torch.randn(1, 4, 16, dtype=torch.float64))[0] == 2
    model(torch.randn(1, 4, 16, dtype=torch.float64))
    assert seen
    restore_mha(model)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    assert model.use_nested_tensor == nested
    assert len(model.layers[0].self_attn._forward_pre_hooks) == count
    hook.remove()


def test_replace_reports_subclasses():
    class Special(nn.MultiheadAttention):
        pass

    model = nn.ModuleList([Special(8, 2), nn.MultiheadAttention(8, 2)])
    with pytest.warns(UserWarning, match=r"0 \(Special\)"):
        replace_mha(model)
    assert type(model[0]) is Special and type(model[1]) is MultiheadAttention


def test_patch_reaches_the_module_of_torch():
    module = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 5, 16)
    expected, _ = module(x, x, x, need_weights=False)
    with flash_attn.sdpa_patch():
        count, (out, _) = calls_to_us(module, x, x, x, need_weights=False)
    assert count == 1
    torch.testing.assert_close(out, expected)
