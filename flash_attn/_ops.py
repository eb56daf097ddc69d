# SPDX-License-Identifier: BSD-3-Clause
"""Loads flash_attn._C, which registers torch.ops.flash_attn, and types what it offers.

Dense tensors are (B, H, L, E); packed ones, with cu_seqlens, (T, H, E). A Tensor that stands for a
gradient nobody asked for has no elements. `_as_4d` returns None where there is no bias or mask.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

REBUILD = "rebuild it there: pip install --no-build-isolation --force-reinstall --no-deps ."


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _check_build(info: dict[str, Any]) -> None:
    """The extension calls torch's C++ code: it runs with the torch it was compiled against."""
    built, found = _minor(info["torch"]), _minor(torch.__version__)
    if built != found:
        raise ImportError(f"flash_attn was built for torch {built}, found torch {found}; {REBUILD}")
    if info["cuda"] is None:
        return
    built_cuda = info["cuda"].split(".")[0]
    found_cuda = torch.version.cuda and torch.version.cuda.split(".")[0]
    if built_cuda != found_cuda:
        raise ImportError(
            f"flash_attn was built for CUDA {built_cuda}, found a torch with CUDA {found_cuda}; "
            f"{REBUILD}"
        )


def _load() -> tuple[ModuleType, dict[str, Any]]:
    try:
        info: dict[str, Any] = importlib.import_module("flash_attn._build_info").INFO
    except ModuleNotFoundError:
        raise ImportError(
            "flash_attn is not built: run `pip install --no-build-isolation .` (or `make build`) "
            "in its source folder, with torch installed"
        ) from None
    _check_build(info)
    return importlib.import_module("flash_attn._C"), info


_C, _BUILD_INFO = _load()


def build_info() -> dict[str, Any]:
    """What this build is: source revision, torch, CUDA, architectures, compiler, backends."""
    return {**_BUILD_INFO, **{f"extension_{k}": v for k, v in _C.build_info().items()}}


def attention(
    q: Tensor, k: Tensor, v: Tensor, *optional: Any, **features: Any
) -> tuple[Tensor, Tensor]:
    """(out, lse), both differentiable; the arguments of `_fwd`, then `deterministic`."""
    out, lse = torch.ops.flash_attn.attention(q, k, v, *optional, **features)
    return out, lse


def forward(
    q: Tensor, k: Tensor, v: Tensor, *optional: Any, **features: Any
) -> tuple[Tensor, Tensor]:
    """(out, lse) without autograd."""
    out, lse = torch.ops.flash_attn._fwd(q, k, v, *optional, **features)
    return out, lse


def rng_state(like: Tensor, increment: int) -> Tensor:
    """(seed, offset), int64, drawn from the default generator of like's device."""
    state: Tensor = torch.ops.flash_attn.rng_state(like, increment)
    return state


def why_unsupported(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str = "", backward: bool = False, **features: Any
) -> list[str]:
    """Why the backend, or with "" every backend of q's device, cannot take the call; [] if one can.

    Arguments that no backend could take raise as the call itself would.
    """
    reasons: list[str] = torch.ops.flash_attn._why_unsupported(
        q, k, v, backend=backend, backward=backward, **features
    )
    return reasons
