# SPDX-License-Identifier: BSD-3-Clause
"""Exact attention for torch users: torch's own function, and one with every option by name.

Source: Dao, FlashAttention-2 (2023), algorithms 1 and 2; the formula is `flash_attn.reference`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nested._internal.nested_tensor import NestedTensor
from torch.overrides import handle_torch_function, has_torch_function

from . import _transforms

__all__ = ["attention", "dropout_mask", "scaled_dot_product_attention"]

builtin_sdpa = torch._C._nn.scaled_dot_product_attention
_broadcast_shapes: Callable[..., torch.Size] = torch.broadcast_shapes
_PLAIN = (Tensor, torch.nn.Parameter)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, by our kernels; same arguments.

        softmax(query @ key.mT * scale + attn_mask) @ value

    Memory is linear in the sequence lengths, the gradient of `attn_mask` and dropout included.

    Args:
        query: (..., H, L, E), two or more dimensions.
        key: (..., H, S, E).  value: (..., H, S, Ev). Leading dimensions broadcast as in matmul.
        attn_mask: broadcastable to (..., H, L, S); bool (True: attend), or added to the scores, in
            the dtype of query or float32; or a `torch.nn.attention.bias.CausalBias`.
        dropout_p: probability of dropping a weight; applied whenever it is positive.
        is_causal: query i sees the keys j <= i (top-left aligned); not together with a mask.
        scale: 1 / sqrt(E) by default; any finite number.
        enable_gqa: key and value may have fewer heads, of which that of query divides.

    Returns:
        (..., H, L, Ev) in the dtype of query, in memory in the order of query's dimensions. A row
        whose keys are all masked is 0, and so is its gradient.

    Dtypes: float16, bfloat16, float32, float64; accumulation in float32 (float64).

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, with torch's texts.
        ValueError: a CausalBias together with is_causal, or of other lengths than (L, S).
        NotImplementedError: under forward-mode AD; dtypes that have no attention.
    """
    tensors = (query, key, value, attn_mask)
    if has_torch_function(tensors):
        if any(isinstance(t, NestedTensor) for t in (query, key, value)):
            # A jagged tensor recognises the builtin alone.
            return builtin_sdpa(
                query, key, value, attn_mask, dropout_p, is_causal,
                scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip
        if _is_causal_bias(attn_mask):
            return _causal_bias_sdpa(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )
        result: Tensor = handle_torch_function(
            scaled_dot_product_attention, tensors, query, key, value,
            attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
            enable_gqa=enable_gqa,
        )  # fmt: skip
        return result
    if query.is_nested or key.is_nested or value.is_nested:
        return builtin_sdpa(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if _transforms.transforming():
        return _sdpa_over_attention(
            query, key, value, attn_mask, dropout_p, is_causal, False, scale, enable_gqa
        )
    out: Tensor = torch.ops.flash_attn.sdpa(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )
    return out


def _is_causal_bias(attn_mask: Tensor | None) -> bool:
    """Importing the class costs as much memory as torch.compile, so it is not imported here:
    where nobody else has, there is no such mask."""
    module = sys.modules.get("torch.nn.attention.bias")
    return module is not None and isinstance(attn_mask, module.CausalBias)


def _causal_bias_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """A CausalBias is a causal mask by name; its numbers are never made."""
    if is_causal:
        raise ValueError("CausalBias should not be used with causal=True")
    check_causal_bias(query, key, value, bias)
    if bias.variant.name == "UPPER_LEFT" or bias.seq_len_q == bias.seq_len_kv:
        return scaled_dot_product_attention(
            query, key, value, None, dropout_p, True, scale=scale, enable_gqa=enable_gqa
        )
    if all(type(t) in _PLAIN for t in (query, key, value)):
        return _sdpa_over_attention(
            query, key, value, None, dropout_p, True, True, scale, enable_gqa
        )
    return scaled_dot_product_attention(
        query, key, value, bias._materialize(query.device), dropout_p,
        scale=scale, enable_gqa=enable_gqa,
    )  # fmt: skip


def check_causal_bias(query: Tensor, key: Tensor, value: Tensor, bias: Any) -> None:
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            "Expected query, key, and value to have the same dtype, "
            f"but got query.dtype: {query.dtype}, key.dtype: {key.dtype}, "
            f"and value.dtype: {value.dtype} instead."
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            "Expected query, key, and value to have the same device type, "
            f"but got query.device: {query.device}, key.device: {key.device}, "
            f"and value.device: {value.device} instead."
        )
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise ValueError(
            "Expected query, key, and value to all be  at least 2 dimensional, but got "
            f"query.dim: {query.dim()}, key.dim: {key.dim()} and value.dim: {value.dim()} instead."
        )
    lengths = (query.shape[-2], key.shape[-2])
    if (bias.seq_len_q, bias.seq_len_kv) != lengths:
        raise ValueError(
            f"flash_attn: expected a CausalBias of the lengths of query and key, {lengths}, "
            f"got one of {(bias.seq_len_q, bias.seq_len_kv)}"
        )


def _sdpa_over_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    bottom_right: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """What the op `sdpa` does, in Python: for torch.func, and for bottom-right causal masks."""
    query, key, value, attn_mask = _transforms.autocast(query, key, value, attn_mask)
    q, k, v, bias, mask = torch.ops.flash_attn._as_4d(
        query, key, value, attn_mask, is_causal, enable_gqa
    )
    out, _ = _attend(
        q, k, v,
        bias=bias, mask=mask, dropout_p=dropout_p, rng_state=None, scale=scale, deterministic=None,
        bottom_right=bottom_right, window_right=0 if is_causal else None,
    )  # fmt: skip
    inner = 3 if enable_gqa else 2  # the dimensions that do not broadcast
    leading = _broadcast_shapes(*(t.shape[:-inner] for t in (query, key, value)))
    return out.reshape(*leading, *query.shape[-inner:-1], value.shape[-1])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: str | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    scale: float | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T + bias) v, with every option by its name.

    Args:
        q: (B, H, L, E).  k: (B, Hk, S, E).  v: (B, Hk, S, Ev). Grouped heads are implied: H is a
            multiple of Hk, and query head h reads key head h // (H / Hk).
        bias: added to the scores; broadcastable to (B, H, L, S); dtype of q or float32. It gets
            its gradient, reduced to its own shape.
        mask: bool, True keeps; broadcastable to (B, H, L, S). May be combined with all else.
        causal: None; "top_left": query i sees the keys j <= i, as in torch; "bottom_right": the
            keys j <= i + S - L, as in FlashAttention and for decoding.
        dropout_p: probability of dropping a weight, 0 to 1.
        rng_state: int64 (seed, offset) on q's device, which decides what is dropped
            (`dropout_mask`); by default drawn from the device's generator.
        scale: 1 / sqrt(E) by default.
        deterministic: the same gradient bits in every run; by default as
            `torch.use_deterministic_algorithms` says, which True here never weakens.
        return_lse: also return the logarithm of each row's sum of exponentials.

    Returns:
        out (B, H, L, Ev), dtype of q; with return_lse (out, lse), lse (B, H, L) in float32
        (float64 for float64), natural logarithm, -inf and out 0 for a row that sees nothing. Both
        are differentiable.

    Raises:
        TypeError: `causal` is a bool, whose meaning is not one thing.
        ValueError: any other `causal`; tensors that are not 4-D.
        RuntimeError: shapes, dtypes or devices that do not fit.
    """
    check_causal(causal)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise ValueError(
                f"flash_attn: expected {name} of 4 dimensions (batch, heads, length, head_dim), "
                f"got {tuple(t.shape)}"
            )
    out, lse = _attend(
        q, k, v,
        bias=four_dims("bias", bias), mask=four_dims("mask", mask), dropout_p=dropout_p,
        rng_state=rng_state, scale=scale, deterministic=deterministic,
        bottom_right=causal == "bottom_right", window_right=0 if causal is not None else None,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def check_causal(causal: object) -> None:
    choices = "'top_left' (query i sees keys j <= i) or 'bottom_right' (keys j <= i + S - L)"
    if isinstance(causal, bool):
        raise TypeError(
            f"flash_attn: causal must say how the diagonal is aligned: None, {choices}; got the "
            f"bool {causal}"
        )
    if causal not in (None, "top_left", "bottom_right"):
        raise ValueError(f"flash_attn: expected causal to be None, {choices}, got {causal!r}")


def default_scale(q: Tensor, scale: float | None) -> float:
    if scale is not None:
        return scale
    return 1 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0


def four_dims(name: str, x: Tensor | None) -> Tensor | None:
    if x is None or x.dim() == 4:
        return x
    if x.dim() > 4:
        raise ValueError(
            f"flash_attn: expected {name} broadcastable to (batch, heads, L, S), "
            f"got {tuple(x.shape)}"
        )
    return x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None,
    mask: Tensor | None,
    dropout_p: float,
    rng_state: Tensor | None,
    scale: float | None,
    deterministic: bool | None,
    bottom_right: bool,
    window_right: int | None,
) -> tuple[Tensor, Tensor]:
    drawn = dropout_p > 0 and rng_state is None
    if drawn:
        rng_state = _transforms.draw_rng_state(q.shape[0] * q.shape[1], q, k, v, bias, mask)
    return _transforms.attention(
        q, k, v, bias=bias, mask=mask, rng_state=rng_state, rng_state_drawn=drawn,
        bottom_right=bottom_right, window_right=window_right, scale=default_scale(q, scale),
        dropout_p=dropout_p,
        deterministic=bool(deterministic) or torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def dropout_mask(rng_state: Tensor, shape: tuple[int, int, int, int], p: float) -> Tensor:
    """Which weights dropout of probability p keeps: what every kernel does for this rng_state.

    Args:
        rng_state: int64 (seed, offset), on any device.
        shape: (B, H, L, S).
        p: probability of dropping, 0 to 1, in steps of 2^-16.

    Returns:
        bool (B, H, L, S) on the device of rng_state, True where kept. A pair's value depends on
        its coordinates alone, not on L, S or the device.

    Source: Salmon et al. (2011), Philox4x32-7, keyed by (b H + h, i, j).
    """
    batch, heads, rows, keys = shape
    if p <= 0:
        return torch.ones(shape, dtype=torch.bool, device=rng_state.device)
    # The weights of scores that are all 0 with lse 0 are 1 before dropout, 1 / (1 - p) or 0 after.
    q = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16, device=rng_state.device)
    lse = torch.zeros(batch, heads, rows, device=rng_state.device)
    weights = _transforms.attention_weights(
        q.expand(batch, heads, rows, 1), q.expand(batch, heads, keys, 1), lse,
        rng_state=rng_state, dropout_p=p, average=False,
    )  # fmt: skip
    return weights != 0
