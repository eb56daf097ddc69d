# SPDX-License-Identifier: BSD-3-Clause
"""Who is measured: flash_attn, each of its backends, each SDPA backend of torch, the formula."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .cases import Case

TORCH_DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    dout: Tensor | None

    @property
    def differentiated(self) -> list[Tensor]:
        return [t for t in (self.q, self.k, self.v, self.mask) if t is not None and t.requires_grad]


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Normal numbers: zeros would draw less power and run faster on a GPU."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = TORCH_DTYPES[case.dtype]
    needs_grad = case.direction != "forward"

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    b, h, hk, sq, sk = case.batch, case.heads, case.heads_k, case.seqlen_q, case.seqlen_k
    q = normal(b, h, sq, case.head_dim).requires_grad_(needs_grad)
    k = normal(b, hk, sk, case.head_dim).requires_grad_(needs_grad)
    v = normal(b, hk, sk, case.head_dim_v).requires_grad_(needs_grad)
    mask = None
    if case.mask == "bool":
        mask = torch.rand(b, 1, sq, sk, generator=generator, device=device) < 0.8
    elif case.mask == "padding":
        lengths = torch.linspace(sk / 2, sk, b, device=device).int()
        mask = (torch.arange(sk, device=device) < lengths[:, None])[:, None, None, :]
    elif case.mask in ("additive", "bias"):
        mask = normal(1, h, sq, sk).requires_grad_(needs_grad and case.mask == "bias")
    dout = normal(b, h, sq, case.head_dim_v) if needs_grad else None
    return Inputs(q, k, v, mask, dout)


Attention = Callable[[Case, Inputs], Tensor]


@dataclass
class Rival:
    """A way to compute attention: `run` inside `context`."""

    name: str
    run: Attention
    context: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    quadratic: bool = False  # holds score matrices: refused where they would not fit


def _torch_sdpa(case: Case, x: Inputs) -> Tensor:
    return F.scaled_dot_product_attention(
        x.q,
        x.k,
        x.v,
        x.mask,
        case.dropout_p,
        case.causal,
        enable_gqa=case.heads != case.heads_k,
    )


def eager(case: Case, x: Inputs) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, one torch operator a step."""
    k, v = x.k, x.v
    if case.heads != case.heads_k:
        k = k.repeat_interleave(case.heads // case.heads_k, dim=1)
        v = v.repeat_interleave(case.heads // case.heads_k, dim=1)
    scores = (x.q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(case.head_dim))
    if case.causal:
        keep = torch.ones(
            case.seqlen_q, case.seqlen_k, dtype=torch.bool, device=scores.device
        ).tril()
        scores = scores.masked_fill(~keep, -math.inf)
    if x.mask is not None:
        scores = (
            scores.masked_fill(~x.mask, -math.inf)
            if x.mask.dtype == torch.bool
            else scores + x.mask
        )
    weights = torch.softmax(scores, dim=-1)
    if case.dropout_p > 0:
        weights = F.dropout(weights, case.dropout_p)
    return weights @ v


def _ours(case: Case, x: Inputs) -> Tensor:
    import flash_attn

    return flash_attn.scaled_dot_product_attention(
        x.q,
        x.k,
        x.v,
        x.mask,
        case.dropout_p,
        case.causal,
        enable_gqa=case.heads != case.heads_k,
    )


def _use_backend(name: str) -> AbstractContextManager[object]:
    import flash_attn

    return flash_attn.use_backend(name)


def _use_isa(name: str) -> AbstractContextManager[object]:
    import flash_attn

    return flash_attn.use_cpu_isa(name)


_TORCH_BACKENDS = {
    "torch-flash": SDPBackend.FLASH_ATTENTION,
    "torch-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch-cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch-math": SDPBackend.MATH,
}
_CPU_BACKENDS = ("torch-flash", "torch-math")  # torch has no others on a CPU


def default_rivals(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return ["ours", "ours:simt", "ours:sm80", *_TORCH_BACKENDS, "eager"]
    return ["ours", *_CPU_BACKENDS, "eager"]


def make_rival(name: str) -> Rival:
    """ours | ours:BACKEND | ours@ISA | torch | torch-{flash,efficient,cudnn,math} | eager."""
    if name == "ours":
        return Rival(name, _ours)
    if name.startswith("ours:"):
        return Rival(name, _ours, lambda: _use_backend(name.removeprefix("ours:")))
    if name.startswith("ours@"):
        return Rival(name, _ours, lambda: _use_isa(name.removeprefix("ours@")))
    if name == "torch":
        return Rival(name, _torch_sdpa)
    if name == "eager":
        return Rival(name, eager, quadratic=True)
    if name in _TORCH_BACKENDS:
        backend = _TORCH_BACKENDS[name]
        return Rival(
            name, _torch_sdpa, lambda: sdpa_kernel(backend), quadratic=name == "torch-math"
        )
    known = ["ours", "ours:BACKEND", "ours@ISA", "torch", *_TORCH_BACKENDS, "eager"]
    raise SystemExit(f"unknown rival {name!r}; known: {', '.join(known)}")


def refusal_reason(name: str, error: BaseException, seen: list[warnings.WarningMessage]) -> str:
    """One line why a rival did not run. torch tells its reasons in warnings, one per backend."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    heading = {
        "torch-flash": "Flash attention kernel not used because",
        "torch-efficient": "Memory efficient kernel not used because",
        "torch-cudnn": "cuDNN attention kernel not used because",
    }.get(name)
    texts = [str(w.message).split(" (Triggered internally")[0].strip() for w in seen]
    for position, text in enumerate(texts[:-1]):
        if heading is not None and text.startswith(heading):
            return texts[position + 1]
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
