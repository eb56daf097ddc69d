# SPDX-License-Identifier: BSD-3-Clause
"""The public functions of FlashAttention-2, dense and packed.

Layouts are FlashAttention-2's: dense (batch, seqlen, heads, head_dim), packed (total, heads,
head_dim). Causal masks and windows are aligned bottom-right: query i of a sequence stands at key
i + seqlen_k - seqlen_q. Beyond FlashAttention-2: CPU tensors, float32 and float64, any head
dimension, v of another head dimension, softcap with dropout, gradients through the returned lse and
to alibi_slopes, lse -inf where a query sees nothing.

Source: Dao, FlashAttention-2 (2023); Press et al., ALiBi (2022).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _dropout_probabilities, _joint, _transforms

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]

Result = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of q (b, sq, h, d) over k (b, sk, hk, d) and v (b, sk, hk, dv).

    Args:
        dropout_p: probability of dropping a weight; 0 in evaluation.
        softmax_scale: 1 / sqrt(d) by default.
        causal: query i sees the keys j <= i + sk - sq.
        window_size: (left, right), a tuple, list or tensor: query i sees the keys
            i + sk - sq - left ... i + sk - sq + right; negative: unbounded.
        softcap: scores become softcap * tanh(score / softcap); 0: off.
        alibi_slopes: (h) or (b, h): adds -slope * |i + sk - sq - j| to the scores.
        deterministic: the same gradient bits in every run; `torch.use_deterministic_algorithms`
            implies it.
        return_attn_probs: for tests; also return lse and S_dmask.

    h is a multiple of hk; query head i reads key head i // (h / hk). Dtypes: float16, bfloat16,
    float32, float64, accumulated in float32 (float64).

    Returns:
        out (b, sq, h, dv), 0 for queries that see nothing. With return_attn_probs
        (out, lse, S_dmask): lse (b, h, sq), natural logarithm, float32 (float64 for float64);
        S_dmask without elements if dropout_p is 0, else (b, h, sq, sk), both lengths rounded up to
        a multiple of 128: exp(score - the row's largest score), negative where dropped, 0 where
        masked.

    Raises:
        RuntimeError: dtypes, shapes or devices that do not fit.
    """

    def call(**options: Any) -> tuple[Tensor, Tensor]:
        return _transforms.attention(*(t.transpose(1, 2) for t in (q, k, v)), **options)

    _check_dims(4, ("q", q), ("k", k), ("v", v))
    _check_types(q, k, v)
    return _dense(
        call, lambda: (q, k), (q, k, v),
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of q, k and v that lie in one tensor, as one projection makes them.

    Faster than `flash_attn_func` on the three slices: the gradient is one tensor too, and autograd
    does not gather it from three.

    Args:
        qkv: (b, s, 3, h, d): q, k and v.

    The rest, returned values and errors as in `flash_attn_func`.
    """
    _joint.check("qkv", qkv, 3, 5)
    return _dense(
        partial(_joint.attention, None, qkv), lambda: qkv.unbind(2)[:2], (qkv,),
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of q (b, sq, h, d) over k and v that lie in one tensor, kv (b, sk, 2, hk, d).

    The rest, returned values and errors as in `flash_attn_func`.
    """
    _joint.check("kv", kv, 2, 5)
    _check_dims(4, ("q", q))
    _check_types(q, kv, kv)

    def call(**options: Any) -> tuple[Tensor, Tensor]:
        return _joint.attention(q.transpose(1, 2), kv, **options)

    return _dense(
        call, lambda: (q, kv.select(2, 0)), (q, kv),
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Attention inside each sequence of a packed batch: q (Tq, h, d), k and v (Tk, hk, d or dv).

    Args:
        cu_seqlens_q, cu_seqlens_k: (b + 1,), int32 or int64, on q's device: sequence i owns the
            rows cu_seqlens[i] ... cu_seqlens[i + 1] - 1. Equal entries: an empty sequence.
        max_seqlen_q, max_seqlen_k: bounds on the lengths, numbers or 0-d tensors.
        block_table: paged keys are not supported here; must be None.

    The rest as in `flash_attn_func`, with sq and sk the lengths of the sequence itself.

    Returns:
        out (Tq, h, dv), 0 in rows that no sequence owns. With return_attn_probs
        (out, lse, S_dmask): lse (h, Tq), -inf in rows that no sequence owns; S_dmask
        (b, h, max_seqlen_q, max_seqlen_k), rounded up to multiples of 128 (its making reads
        cu_seqlens on the host).

    Raises:
        NotImplementedError: block_table is given.
        RuntimeError: dtypes, shapes or devices that do not fit.
    """
    if block_table is not None:
        raise NotImplementedError(
            "flash_attn: flash_attn_varlen_func does not support paged keys; expected "
            "block_table=None"
        )
    _check_dims(3, ("q", q), ("k", k), ("v", v))
    _check_types(q, k, v)
    return _varlen(
        partial(_transforms.attention, q, k, v), lambda: (q, k), (q, k, v),
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of q, k and v that lie in one tensor, qkv (T, 3, h, d).

    The same sequences for queries and keys, cu_seqlens (b + 1,), none longer than max_seqlen.
    """
    _joint.check("qkv", qkv, 3, 4)
    return _varlen(
        partial(_joint.attention, None, qkv), lambda: qkv.unbind(1)[:2], (qkv,),
        cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of q (Tq, h, d) over k and v in one tensor, kv (Tk, 2, hk, d)."""
    _joint.check("kv", kv, 2, 4)
    _check_dims(3, ("q", q))
    _check_types(q, kv, kv)
    return _varlen(
        partial(_joint.attention, q, kv), lambda: (q, kv.select(1, 0)), (q, kv),
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


Attend = Callable[..., tuple[Tensor, Tensor]]  # the options -> (out, lse), as the op lays them


def _dense(
    call: Attend,
    queries_and_keys: Callable[[], Sequence[Tensor]],
    tensors: tuple[Tensor, ...],
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int] | Tensor,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
) -> Result:
    """`tensors`: those of the call; the first is (batch, ..., heads of q, head_dim). Views are made
    only for who asks for them: each costs about a microsecond, more where autograd records."""
    options, drawn = _options(
        tensors, tensors[0].shape[0], dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes,
    )  # fmt: skip
    out, lse = call(rng_state_drawn=drawn, deterministic=_deterministic(deterministic), **options)
    out = out.transpose(1, 2)
    if not return_attn_probs:
        return out
    with torch.no_grad():
        q, k = (t.transpose(1, 2) for t in queries_and_keys())
        return out, lse, _dropout_probabilities.dense(q, k, options)


def _varlen(
    call: Attend,
    queries_and_keys: Callable[[], Sequence[Tensor]],
    tensors: tuple[Tensor, ...],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int] | Tensor,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
) -> Result:
    """`tensors`: those of the call, (tokens, ..., heads, head_dim); q's first, k's last."""
    max_q = _length(max_seqlen_q, tensors[0].shape[0])
    max_k = _length(max_seqlen_k, tensors[-1].shape[0])
    options, drawn = _options(
        tensors, cu_seqlens_q.shape[0] - 1, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes,
    )  # fmt: skip
    out, lse = call(
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_q,
        max_seqlen_k=max_k, rng_state_drawn=drawn, deterministic=_deterministic(deterministic),
        **options,
    )  # fmt: skip
    if not return_attn_probs:
        return out
    with torch.no_grad():
        q, k = queries_and_keys()
        probabilities = _dropout_probabilities.packed(
            q, k, cu_seqlens_q, cu_seqlens_k, max_q, max_k, options
        )
    return out, lse, probabilities


def _check_dims(dims: int, *tensors: tuple[str, Tensor]) -> None:
    layout = "(batch, seqlen, heads, head_dim)" if dims == 4 else "(total, heads, head_dim)"
    for name, t in tensors:
        if t.dim() != dims:
            raise RuntimeError(f"flash_attn: expected {name} {layout}, got {tuple(t.shape)}")


def _check_types(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Dtypes and heads; k and v may be one tensor of both."""
    if not _autocasting(q):
        if q.dtype != k.dtype:
            raise RuntimeError("query and key must have the same dtype")
        if q.dtype != v.dtype:
            raise RuntimeError("query and value must have the same dtype")
    heads, heads_k = q.shape[-2], k.shape[-2]
    if heads != heads_k and (heads_k == 0 or heads % heads_k != 0):
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")


def _autocasting(q: Tensor) -> bool:
    return torch.is_autocast_enabled(q.device.type)


def _deterministic(asked: bool) -> bool:
    return asked or torch.are_deterministic_algorithms_enabled()


def _options(
    tensors: tuple[Tensor, ...],
    batch: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int] | Tensor,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> tuple[dict[str, Any], bool]:
    """FlashAttention-2's arguments as those of the op, and whether a dropout state was drawn."""
    if len(window_size) != 2:
        raise RuntimeError(
            f"flash_attn: expected window_size of two numbers (left, right), got {window_size!r}"
        )
    left, right = (int(w) for w in window_size)
    heads, head_dim = tensors[0].shape[-2:]
    if softmax_scale is None:
        softmax_scale = 1 / math.sqrt(head_dim) if head_dim else 1.0
    drawn = dropout_p > 0
    options = {
        "alibi_slopes": alibi_slopes,
        "rng_state": _transforms.draw_rng_state(batch * heads, *tensors) if drawn else None,
        "bottom_right": True,
        "window_left": left if left >= 0 else None,
        "window_right": 0 if causal else right if right >= 0 else None,
        "scale": softmax_scale,
        "softcap": softcap,
        "dropout_p": dropout_p,
    }
    return options, drawn


def _length(value: int | Tensor, total: int) -> int:
    """max_seqlen as a number. While a CUDA graph is captured a tensor on the device cannot be
    read: the number of all tokens bounds it."""
    if isinstance(value, int | torch.SymInt):
        return value
    if isinstance(value, Tensor):
        if value.is_cuda and torch.cuda.is_current_stream_capturing():
            return total
        return int(value)
    return operator.index(value)
