# SPDX-License-Identifier: BSD-3-Clause
"""Bad input gets a sentence that names the argument, what was expected and what came; torch's own
texts where torch's tests pin them. Nothing crashes, nothing is guessed."""

import re

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import flash_attn

sdpa = flash_attn.scaled_dot_product_attention
op = torch.ops.flash_attn.attention


def make(*shape, dtype=torch.float32):
    return (
        torch.randn(*shape).to(dtype) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)
    )


def raises(text, error=RuntimeError):
    return pytest.raises(error, match=re.escape(text))


Q, K = (2, 4, 5, 8), (2, 4, 7, 8)


def test_dtypes_differ():
    text = ("Expected query, key, and value to have the same dtype, but got query.dtype: float "
            "key.dtype: c10::Half and value.dtype: float instead.")  # fmt: skip
    with raises(text):
        sdpa(make(*Q), make(*K, dtype=torch.float16), make(*K))


def test_devices_differ():
    text = ("Expected query, key, and value to have the same device type, but got query.device: "
            "cpu key.device: meta and value.device: cpu instead.")  # fmt: skip
    with raises(text):
        sdpa(make(*Q), make(*K).to("meta"), make(*K))


def test_one_dimension():
    text = ("Expected query, key, and value to all be  at least 2 dimensional, but got query.dim: "
            "1 key.dim: 1 and value.dim: 1 instead.")  # fmt: skip
    with raises(text):
        sdpa(make(8), make(8), make(8))


def test_mask_dtype():
    text = ("Expected attn_mask dtype to be bool or float or to match query dtype, but got "
            "attn_mask.dtype: long int and  query.dtype: float instead.")  # fmt: skip
    with raises(text):
        sdpa(make(*Q), make(*K), make(*K), torch.ones(5, 7, dtype=torch.int64))
    with raises("Expected attn_mask dtype to be bool or float or to match query dtype"):
        sdpa(make(*Q), make(*K), make(*K), torch.zeros(5, 7, dtype=torch.float64))


def test_mask_and_causal():
    text = ("_scaled_dot_product_attention: Explicit attn_mask should not be set when "
            "is_causal=True")  # fmt: skip
    for mask in (torch.ones(5, 7, dtype=torch.bool), torch.zeros(5, 7)):
        with raises(text):
            sdpa(make(*Q), make(*K), make(*K), mask, is_causal=True)


def test_grouped_heads():
    with raises("Number of heads in key and value must divide the number of heads in "):
        sdpa(make(2, 4, 5, 8), make(2, 3, 7, 8), make(2, 3, 7, 8), enable_gqa=True)
    with raises("Number of heads in key and value must divide the number of heads in "):
        sdpa(make(2, 4, 5, 8), make(2, 4, 7, 8), make(2, 3, 7, 8), enable_gqa=True)
    text = "Dimension out of range (expected to be in range of [-2, 1], but got -3)"
    with raises(text, IndexError):
        sdpa(make(5, 8), make(7, 8), make(7, 8), enable_gqa=True)


def test_batch_does_not_broadcast():
    text = (
        "The size of tensor a (2) must match the size of tensor b (3) at non-singleton dimension 0"
    )
    with raises(text):
        sdpa(make(2, 4, 5, 8), make(3, 4, 7, 8), make(3, 4, 7, 8))
    with raises("must match the size of tensor b (2)"):
        sdpa(make(1, 8, 5, 8), make(1, 2, 7, 8), make(1, 2, 7, 8))


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_dropout(p):
    with raises("dropout probability has to be between 0 and 1, but got"):
        sdpa(make(*Q), make(*K), make(*K), dropout_p=p)
    with raises("dropout probability has to be between 0 and 1, but got"):
        flash_attn.attention(make(*Q), make(*K), make(*K), dropout_p=p)


def test_causal_bias():
    with raises("CausalBias should not be used with causal=True", ValueError):
        sdpa(make(*Q), make(*K), make(*K), causal_upper_left(5, 7), is_causal=True)
    with pytest.raises(ValueError, match=r"\(5, 7\)"):
        sdpa(make(*Q), make(*K), make(*K), causal_lower_right(5, 8))


@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.int64, RuntimeError), (torch.bool, RuntimeError),
     (torch.complex64, NotImplementedError), (torch.float8_e4m3fn, NotImplementedError)],
    ids=str,
)  # fmt: skip
def test_unsupported_dtypes(dtype, error):
    tensors = [torch.zeros(shape).to(dtype) for shape in (Q, K, K)]
    with pytest.raises(error, match=r"query.*(float16|bfloat16)"):
        sdpa(*tensors)


def test_sizes_of_key_and_value():
    with pytest.raises(RuntimeError, match=r"head dimension of key.*8.*6"):
        sdpa(make(*Q), make(2, 4, 7, 6), make(*K))
    with pytest.raises(RuntimeError, match=r"sequence length of value.*7.*6"):
        sdpa(make(*Q), make(*K), make(2, 4, 6, 8))


@pytest.mark.parametrize("shape", [(4, 7), (5, 8), (2, 2, 1, 5, 7), (3, 4, 5, 7), (2, 3, 5, 7)])
def test_mask_does_not_broadcast(shape):
    with pytest.raises(RuntimeError, match=r"attn_mask.*\[2, 4, 5, 7\]"):
        sdpa(make(*Q), make(*K), make(*K), torch.zeros(shape))


def test_mask_never_enlarges_the_scores():
    with pytest.raises(RuntimeError, match="attn_mask"):
        sdpa(make(5, 8), make(7, 8), make(7, 8), torch.zeros(3, 5, 7))
    with pytest.raises(RuntimeError, match="attn_mask"):
        sdpa(make(1, 1, 5, 8), make(1, 1, 7, 8), make(1, 1, 7, 8), torch.zeros(2, 1, 5, 7))


def test_attention_causal():
    with pytest.raises(TypeError, match=r"top_left.*bottom_right.*True"):
        flash_attn.attention(make(*Q), make(*K), make(*K), causal=True)
    with pytest.raises(ValueError, match=r"causal.*'middle'"):
        flash_attn.attention(make(*Q), make(*K), make(*K), causal="middle")


def test_attention_shapes():
    with pytest.raises(ValueError, match=r"q of 4 dimensions.*\(5, 8\)"):
        flash_attn.attention(make(5, 8), make(*K), make(*K))
    with pytest.raises((ValueError, RuntimeError), match="bias"):
        flash_attn.attention(make(*Q), make(*K), make(*K), bias=torch.zeros(1, 2, 4, 5, 7))
    with pytest.raises(RuntimeError, match=r"mask.*dimension 3.*6"):
        flash_attn.attention(make(*Q), make(*K), make(*K), mask=torch.ones(5, 6, dtype=torch.bool))


OPERATOR = [
    ("bias of the wrong rank", {"bias": torch.zeros(5, 7)}, r"bias of 4 dimensions.*got 2"),
    ("bias of the wrong size", {"bias": torch.zeros(2, 4, 5, 6)}, r"bias.*dimension 3.*got 6"),
    ("bias of integers", {"bias": torch.zeros(1, 1, 5, 7, dtype=torch.int32)}, r"bias of dtype"),
    ("mask of numbers", {"mask": torch.zeros(1, 1, 5, 7)}, r"mask of dtype bool"),
    ("mask of the wrong size", {"mask": torch.ones(3, 1, 1, 7) > 0}, r"mask.*dimension 0.*got 3"),
    ("slopes of other heads", {"alibi_slopes": torch.ones(3)}, r"alibi_slopes.*heads.*4.*3"),
    ("slopes of another batch", {"alibi_slopes": torch.ones(3, 4)}, r"alibi_slopes.*2.*3"),
    ("slopes of three dims", {"alibi_slopes": torch.ones(1, 2, 4)}, r"alibi_slopes of shape"),
    ("slopes of integers", {"alibi_slopes": torch.tensor([1, 2, 3, 4])}, r"alibi_slopes.*float"),
    ("sink of other heads", {"sink": torch.ones(3)}, r"sink.*heads.*4.*3"),
    ("negative softcap", {"softcap": -1.0}, r"softcap >= 0.*-1"),
    ("infinite softcap", {"softcap": float("inf")}, r"softcap.*finite.*inf"),
    ("negative prefix", {"prefix": -1}, r"prefix >= 0.*-1"),
    ("no rng_state", {"dropout_p": 0.5}, r"rng_state.*0.5.*None"),
    ("rng_state of floats", {"dropout_p": 0.5, "rng_state": torch.zeros(2)}, r"rng_state int64"),
    ("rng_state of three", {"dropout_p": 0.5, "rng_state": torch.zeros(3, dtype=torch.int64)},
     r"rng_state int64 of shape \(2\)"),
    ("seqused of another batch", {"seqused_k": torch.tensor([1, 1, 1])}, r"seqused_k.*2.*3"),
    ("seqused of floats", {"seqused_k": torch.ones(2)}, r"seqused_k of dtype int32 or int64"),
    ("seqused beyond the keys", {"seqused_k": torch.tensor([3, 8], dtype=torch.int32)},
     r"seqused_k in \[0, 7\], got 8 at index 1"),
    ("only cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0, 5], dtype=torch.int32)},
     r"cu_seqlens_q and cu_seqlens_k together"),
    ("sink on another device", {"sink": torch.ones(4, device="meta")}, r"sink on the device of"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "text"), [c[1:] for c in OPERATOR], ids=[c[0] for c in OPERATOR]
)
def test_operator(options, text):
    with pytest.raises(RuntimeError, match=text):
        op(make(*Q), make(*K), make(*K), **options)


def test_heads_of_the_operator():
    with pytest.raises(RuntimeError, match="heads"):
        op(make(*Q), make(2, 3, 7, 8), make(2, 3, 7, 8))
    with pytest.raises(RuntimeError, match="heads"):
        op(make(*Q), make(2, 2, 7, 8), make(2, 4, 7, 8))


PACKED = [
    ("descending", [0, 3, 2], [0, 3, 7], r"cu_seqlens_q to ascend, got 3 before 2 at index 1"),
    ("too long", [0, 3, 5], [0, 7, 9], r"cu_seqlens_k to end at 7 tokens or before, got 9"),
    ("negative", [-1, 3, 5], [0, 3, 7], r"cu_seqlens_q to start at 0 or later, got -1"),
    ("beyond max_seqlen", [0, 1, 5], [0, 3, 7], r"cu_seqlens_q longer than max_seqlen, 3, got 4"),
    ("of other lengths", [0, 3, 5], [0, 7], r"cu_seqlens_k.*3.*2"),
]


@pytest.mark.parametrize(("ends_q", "ends_k", "text"), [c[1:] for c in PACKED],
                         ids=[c[0] for c in PACKED])  # fmt: skip
def test_packed(ends_q, ends_k, text):
    with pytest.raises(RuntimeError, match=text):
        op(make(5, 4, 8), make(7, 4, 8), make(7, 4, 8),
           cu_seqlens_q=torch.tensor(ends_q, dtype=torch.int32),
           cu_seqlens_k=torch.tensor(ends_k, dtype=torch.int32),
           max_seqlen_q=3, max_seqlen_k=7)  # fmt: skip


def test_packed_tensors_have_three_dimensions():
    ends = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="query of 3 dimensions"):
        op(make(*Q), make(*K), make(*K), cu_seqlens_q=ends, cu_seqlens_k=ends)


def test_backends_by_name():
    with (
        pytest.raises((ValueError, RuntimeError), match=r"cpu.*'sm12'"),
        flash_attn.use_backend("sm12"),
    ):
        pass
    assert flash_attn._C.get_backend() == ""
    others = [name for name in flash_attn._C.backends() if name != "cpu"]
    for name in others:
        with flash_attn.use_backend(name), pytest.raises(RuntimeError, match=f"'{name}'.*cpu"):
            op(make(*Q), make(*K), make(*K))


def test_backend_comes_back_after_an_error():
    with pytest.raises(ZeroDivisionError), flash_attn.use_backend("cpu"):
        raise ZeroDivisionError
    assert flash_attn._C.get_backend() == ""


def test_can_use_gives_reasons():
    assert flash_attn.can_use(make(*Q), make(*K), make(*K)) == (True, "")
    assert flash_attn.can_use(make(*Q), make(*K), make(*K), backend="cpu")[0]
    can, reason = flash_attn.can_use(make(*Q), make(*K), make(*K), backend="sm80")
    assert not can and reason
    can, reason = flash_attn.can_use(make(*Q), make(2, 4, 7, 6), make(*K))
    assert not can and "head dimension" in reason


def test_nothing_is_left_behind_by_an_error():
    """The same call works after a refused one, with the same bits."""
    q, k, v = make(*Q), make(*K), make(*K)
    before = sdpa(q, k, v)
    with pytest.raises(RuntimeError):
        sdpa(q, k, v, dropout_p=2.0)
    assert torch.equal(sdpa(q, k, v), before)


def test_double_backward_names_the_operator():
    q, k, v = (make(*Q).requires_grad_() for _ in range(3))
    (grad,) = torch.autograd.grad(sdpa(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="flash_attn::_bwd"):
        torch.autograd.grad(grad.sum(), q)


def test_forward_mode_says_so():
    q, k, v = make(*Q), make(*K), make(*K)
    with pytest.raises(NotImplementedError, match="forward-mode AD"):
        torch.func.jvp(lambda x: sdpa(x, k, v), (q,), (q,))
