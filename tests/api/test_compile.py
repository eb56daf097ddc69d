# SPDX-License-Identifier: BSD-3-Clause
"""torch.compile, compiled autograd and torch.export."""

import pytest
import torch
from cases import BY_NAME
from inputs import make_inputs
from torch._dynamo import compiled_autograd

import flash_attn

sdpa = flash_attn.scaled_dot_product_attention


def model(q, k, v, mask):
    out = sdpa(q, k, v, mask) + sdpa(q, k, v, is_causal=True)
    return flash_attn.attention(out, k, v, causal="bottom_right", scale=0.2)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    for length in (16, 24) if dynamic else (16,):
        q, k, v = (torch.randn(2, 3, length, 8, requires_grad=True) for _ in range(3))
        mask = torch.randn(length, length, requires_grad=True)
        leaves = (q, k, v, mask)
        expected = torch.autograd.grad(model(*leaves).square().sum(), leaves)
        out = compiled(*leaves)
        got = torch.autograd.grad(out.square().sum(), leaves)
        torch.testing.assert_close(out, model(*leaves))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_compile_dropout():
    """Drawn anew by every call, and reproducible by the seed."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: sdpa(q, q, q, dropout_p=0.5), fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    q = torch.randn(1, 2, 32, 8)
    torch.manual_seed(1)
    first, second = compiled(q), compiled(q)
    torch.manual_seed(1)
    assert torch.equal(compiled(q), first) and not torch.equal(first, second)


@pytest.mark.parametrize("name", ["gqa_bias_sink_slopes", "packed_features"])
def test_compiled_autograd(name):
    """torch can compile the backward of a forward that ran in eager mode."""
    inputs = make_inputs(BY_NAME[name], "float32")
    leaves = {n: inputs.tensors[n].detach().requires_grad_() for n in inputs.differentiable()}

    def loss():
        out, lse = torch.ops.flash_attn.attention(**(inputs.tensors | leaves), **inputs.options)
        return out.square().sum() + lse.sin().nan_to_num(0).sum()

    expected = torch.autograd.grad(loss(), tuple(leaves.values()))
    value = loss()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        value.backward()
    for name, leaf, grad in zip(leaves, leaves.values(), expected, strict=True):
        assert torch.equal(leaf.grad, grad), name


def test_compile_flash_attn_func():
    torch._dynamo.reset()
    compiled = torch.compile(flash_attn.flash_attn_func, fullgraph=True, backend="aot_eager")
    q = torch.randn(2, 16, 3, 8)
    torch.testing.assert_close(
        compiled(q, q, q, causal=True), flash_attn.flash_attn_func(q, q, q, causal=True)
    )


def test_export():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return sdpa(q, k, v, is_causal=True)

    example = tuple(torch.randn(2, 3, 16, 8) for _ in range(3))
    length = torch.export.Dim("length", min=2, max=512)
    shapes = tuple({2: length} for _ in range(3))
    program = torch.export.export(Module(), example, dynamic_shapes=shapes)
    assert "flash_attn" in str(program.graph)
    longer = tuple(torch.randn(2, 3, 33, 8) for _ in range(3))
    torch.testing.assert_close(program.module()(*longer), sdpa(*longer, is_causal=True))
