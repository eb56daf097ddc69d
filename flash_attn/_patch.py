# SPDX-License-Identifier: BSD-3-Clause
"""torch.nn.functional.scaled_dot_product_attention becomes ours, and comes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .sdpa import builtin_sdpa, scaled_dot_product_attention

__all__ = ["disable_sdpa_patch", "enable_sdpa_patch", "sdpa_patch"]

_functional: Any = torch.nn.functional
_PROTOCOL = "__torch_function__"

# The patch of torch.nn.functional. What was there before is kept on a stack, so that patches nest
# and come off in the reverse order.
_patched: list[tuple[Any, Any]] = []


def enable_sdpa_patch() -> None:
    """Makes `torch.nn.functional.scaled_dot_product_attention` ours, until `disable_sdpa_patch`.

    Reaches everything that looks the function up there: `F.scaled_dot_product_attention(...)`,
    `F.multi_head_attention_forward` and so nn.MultiheadAttention with need_weights=False. Names
    imported before keep torch's function; nn.MultiheadAttention's inference fast path never asks
    (see `flash_attn.nn.replace_mha`).
    """
    from torch.nn.attention.bias import CausalBias  # late: it costs as much as torch.compile

    _patched.append((_functional.scaled_dot_product_attention, CausalBias.__dict__[_PROTOCOL]))
    _functional.scaled_dot_product_attention = scaled_dot_product_attention
    if len(_patched) == 1:
        setattr(CausalBias, _PROTOCOL, classmethod(_causal_bias_protocol))


def disable_sdpa_patch() -> None:
    """Puts back what the last `enable_sdpa_patch` replaced.

    Raises:
        RuntimeError: there is nothing to undo, or somebody patched the function after us and has
            not put it back; it is left alone then.
    """
    if not _patched:
        raise RuntimeError("flash_attn: disable_sdpa_patch without enable_sdpa_patch")
    current = _functional.scaled_dot_product_attention
    if current is not scaled_dot_product_attention:
        raise RuntimeError(
            "flash_attn: torch.nn.functional.scaled_dot_product_attention was replaced by "
            f"{current!r} after flash_attn's patch; undo that one first"
        )
    from torch.nn.attention.bias import CausalBias

    function, protocol = _patched.pop()
    _functional.scaled_dot_product_attention = function
    setattr(CausalBias, _PROTOCOL, protocol)


@contextmanager
def sdpa_patch() -> Iterator[None]:
    """`enable_sdpa_patch` on entry, `disable_sdpa_patch` on exit."""
    enable_sdpa_patch()
    try:
        yield
    finally:
        disable_sdpa_patch()


def _causal_bias_protocol(
    cls: type, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
) -> Any:
    """CausalBias recognises the function by the attribute that is patched, and would take a
    builtin imported earlier for any other op: such callers come to us too."""
    if func is builtin_sdpa:
        return scaled_dot_product_attention(*args, **(kwargs or {}))
    original = _patched[0][1].__func__
    return original(cls, func, types, args, kwargs)
