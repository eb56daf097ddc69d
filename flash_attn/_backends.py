# SPDX-License-Identifier: BSD-3-Clause
"""Which backend takes a call, and the choice of another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ._ops import _C, why_unsupported
from .sdpa import check_causal, default_scale, four_dims

__all__ = ["can_use", "use_backend", "use_cpu_isa"]


def can_use(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: str | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[bool, str]:
    """Whether `attention` takes these arguments, and if not, why.

    Args:
        backend: ask about one backend ("cpu", "simt", "sm80", ...); None: about the one that
            `use_backend` names, or any of the device's. The rest as in `attention`.

    Returns:
        (True, "") or (False, reason), for the forward pass and, where it would be recorded, the
        backward pass. Nothing is computed.
    """
    check_causal(causal)
    wants_grad = torch.is_grad_enabled() and any(
        t.requires_grad for t in (q, k, v, bias) if t is not None
    )
    try:
        reasons = [
            reason
            for backward in ((False, True) if wants_grad else (False,))
            for reason in why_unsupported(
                q, k, v, bias=four_dims("bias", bias), mask=four_dims("mask", mask),
                rng_state=torch.zeros(2, dtype=torch.int64, device=q.device),
                bottom_right=causal == "bottom_right", window_right=None if causal is None else 0,
                scale=default_scale(q, scale), dropout_p=dropout_p,
                backend=_C.get_backend() if backend is None else backend, backward=backward,
            )
        ]  # fmt: skip
    except (RuntimeError, ValueError) as error:
        reasons = [str(error).splitlines()[0]]
    return not reasons, "; ".join(dict.fromkeys(reasons))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within it, calls run on the named backend: "cpu", "simt", "sm80", ...; "" for the best.

    Process-wide, read at each call; a backward pass follows its forward (under torch.func, where
    forward and backward are two calls, each reads it). A backend that cannot take a call raises
    instead of handing it to another one.

    Raises:
        ValueError: the name is not one of the backends in this build.
    """
    outer = _C.get_backend()
    _C.set_backend(name)
    try:
        yield
    finally:
        _C.set_backend(outer)


@contextmanager
def use_cpu_isa(name: str) -> Iterator[None]:
    """Within it, the CPU backend uses the named instruction set: "portable", "avx2", "avx512",
    "avx512_bf16", "amx".

    Process-wide, read twice by each call: not to be entered or left while another thread computes.

    Raises:
        RuntimeError: this build or this processor does not have it.
    """
    outer = _C.cpu_isa()
    _C.set_cpu_isa(name)
    try:
        yield
    finally:
        _C.set_cpu_isa(outer)
