# SPDX-License-Identifier: BSD-3-Clause
"""q, k and v, or k and v, in one tensor, as one projection makes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _transforms


def attention(
    q: Tensor | None,
    joint: Tensor,
    *,
    rng_state_drawn: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`_transforms.attention` where k and v, or without q all three, are parts of one tensor.

    joint is (B, S, 2 or 3, H, E) or, with cu_seqlens, (T, 2 or 3, H, E). Transforms see the parts.
    """
    if not _transforms.transforming():
        out, lse = torch.ops.flash_attn.attention_joint(q, joint, **options)
        return out, lse
    own = joint.unbind(-3)
    if joint.dim() == 5:
        own = tuple(part.transpose(1, 2) for part in own)
    q, k, v = own if q is None else (q, *own)
    return _transforms.attention(q, k, v, rng_state_drawn=rng_state_drawn, **options)


def check(name: str, joint: Tensor, count: int, dims: int) -> None:
    """That joint has `dims` dimensions, the third last of `count`."""
    if joint.dim() != dims or joint.shape[dims - 3] != count:
        layout = "batch, seqlen" if dims == 5 else "total"
        raise RuntimeError(
            f"flash_attn: expected {name} ({layout}, {count}, heads, head_dim), "
            f"got {tuple(joint.shape)}"
        )
