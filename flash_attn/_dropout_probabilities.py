# SPDX-License-Identifier: BSD-3-Clause
"""S_dmask, which FlashAttention-2's functions return for tests of dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _transforms
from .sdpa import dropout_mask


def dense(q: Tensor, k: Tensor, options: dict[str, Any]) -> Tensor:
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


def packed(
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
            signed = dense(q_b, k_b, own)[0]
            result[b, :, : signed.shape[1], : signed.shape[2]] = signed
    return result
