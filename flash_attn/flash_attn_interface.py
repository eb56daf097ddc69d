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
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _transforms
from .sdpa import dropout_mask

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]

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
    _check_tensors(q, k, v, 4)
    options, drawn = _options(
        q, k, v, q.shape[0], dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
    )
    qh, kh, vh = (t.transpose(1, 2) for t in (q, k, v))
    out, lse = _transforms.attention(
        qh, kh, vh, rng_state_drawn=drawn, deterministic=_deterministic(deterministic), **options
    )
    out = out.transpose(1, 2)
    if not return_attn_probs:
        return out
    with torch.no_grad():
        return out, lse, _probabilities(qh, kh, options)


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
    _check_tensors(q, k, v, 3)
    max_q, max_k = _length(max_seqlen_q, q.shape[0]), _length(max_seqlen_k, k.shape[0])
    batch = cu_seqlens_q.shape[0] - 1
    options, drawn = _options(
        q, k, v, batch, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
    )
    out, lse = _transforms.attention(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_q,
        max_seqlen_k=max_k, rng_state_drawn=drawn, deterministic=_deterministic(deterministic),
        **options,
    )  # fmt: skip
    if not return_attn_probs:
        return out
    with torch.no_grad():
        probabilities = _varlen_probabilities(
            q, k, cu_seqlens_q, cu_seqlens_k, max_q, max_k, options
        )
    return out, lse, probabilities


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, dims: int) -> None:
    layout = "(batch, seqlen, heads, head_dim)" if dims == 4 else "(total, heads, head_dim)"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != dims:
            raise RuntimeError(f"flash_attn: expected {name} {layout}, got {tuple(t.shape)}")
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    if softmax_scale is None:
        softmax_scale = 1 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0
    drawn = dropout_p > 0
    options = {
        "alibi_slopes": alibi_slopes,
        "rng_state": _transforms.draw_rng_state(batch * q.shape[-2], q, k, v) if drawn else None,
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


def _probabilities(q: Tensor, k: Tensor, options: dict[str, Any]) -> Tensor:
    """S_dmask of one dense call, q (b, h, sq, d) and k (b, hk, sk, d); unpadded pairs first.

    exp(s - row maximum) is the weight exp(s - lse) over the row's largest weight. The sign bit
    says what was dropped, so what was dropped and rounds to zero becomes the smallest number
    instead: -0.0 >= 0 would read as kept.
    """
    dropout_p: float = options["dropout_p"]
    if dropout_p == 0:
        return q.new_empty(0)
    rng_state = options["rng_state"]
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    placed = {n: options[n] for n in ("bottom_right", "window_left", "window_right")}
    scored = {n: options[n] for n in ("alibi_slopes", "scale", "softcap")}
    exact_q, exact_k = q.to(accumulate), k.to(accumulate)
    no_value = exact_k.new_zeros(*k.shape[:-1], 1)
    _, lse = _transforms.attention(exact_q, exact_k, no_value, **placed, **scored)
    weights = _transforms.attention_weights(
        exact_q, exact_k, lse, average=False, **placed, **scored
    )
    visible = _transforms.attention_weights(
        torch.zeros_like(exact_q), torch.zeros_like(exact_k), torch.zeros_like(lse), average=False,
        **placed,
    )  # fmt: skip
    largest = weights.amax(-1, keepdim=True) if weights.shape[-1] else weights.sum(-1, True)
    probabilities = torch.where(visible != 0, weights / largest, 0).to(q.dtype)
    smallest = -torch.finfo(q.dtype).smallest_normal * torch.finfo(q.dtype).eps
    dropped = torch.where(probabilities > 0, -probabilities, smallest)
    batch, heads, rows, keys = weights.shape
    keep = dropout_mask(rng_state, (batch, heads, rows, keys), dropout_p)
    signed = torch.where(keep | (visible == 0), probabilities, dropped.to(q.dtype))
    return F.pad(signed, (0, -keys % 128, 0, -rows % 128))


def _varlen_probabilities(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    options: dict[str, Any],
) -> Tensor:
    if options["dropout_p"] == 0:
        return q.new_empty(0)
    heads, batch = q.shape[1], cu_seqlens_q.shape[0] - 1
    result = q.new_zeros(batch, heads, max_q + -max_q % 128, max_k + -max_k % 128)
    q_bounds, k_bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    slopes = options["alibi_slopes"]
    for b in range(batch):
        own = dict(options)
        # Dropout counts streams by (sequence, head): sequence b starts b * heads later.
        own["rng_state"] = options["rng_state"] + options["rng_state"].new_tensor([0, b * heads])
        if slopes is not None and slopes.dim() == 2:
            own["alibi_slopes"] = slopes[b : b + 1]
        q_b = q[q_bounds[b] : q_bounds[b + 1]].transpose(0, 1)[None]
        k_b = k[k_bounds[b] : k_bounds[b + 1]].transpose(0, 1)[None]
        if q_b.shape[2] and k_b.shape[2]:
            signed = _probabilities(q_b, k_b, own)[0]
            result[b, :, : signed.shape[1], : signed.shape[2]] = signed
    return result
