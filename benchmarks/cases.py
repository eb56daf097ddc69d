# SPDX-License-Identifier: BSD-3-Clause
"""The cases that are measured, by name, and the suites they form."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

DTYPES = ("fp16", "bf16", "fp32", "fp64")
DIRECTIONS = ("forward", "backward", "both")

# Multiply-adds relative to the forward pass: backward has five products where forward has two.
DIRECTION_WORK = {"forward": 1.0, "backward": 2.5, "both": 3.5}
ELEMENT_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
MASKS = {
    "none": "",
    "bool": "(batch, 1, seqlen_q, seqlen_k), four of five pairs",
    "padding": "bool (batch, 1, 1, seqlen_k), lengths from a half to all",
    "additive": "(1, heads, seqlen_q, seqlen_k), without a gradient",
    "bias": "the same with its gradient",
}


@dataclass(frozen=True)
class Case:
    """One problem: q (batch, heads, seqlen_q, head_dim), k and v with heads_k and seqlen_k."""

    direction: str
    dtype: str
    batch: int
    heads: int
    heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    causal: bool = False
    mask: str = "none"  # one of MASKS
    dropout_p: float = 0.0

    @property
    def name(self) -> str:
        dim = f"d{self.head_dim}"
        if self.head_dim_v != self.head_dim:
            dim += f"v{self.head_dim_v}"
        length = f"n{self.seqlen_q}"
        if self.seqlen_k != self.seqlen_q:
            length += f"k{self.seqlen_k}"
        shape = f"b{self.batch}h{self.heads}"
        if self.heads_k != self.heads:
            shape += f"k{self.heads_k}"
        return "-".join([self.direction, self.dtype, dim, self.pattern, length, shape])

    @property
    def pattern(self) -> str:
        """What is attended, and what is done to the weights: the column `mask` of the tables."""
        parts = ["causal" if self.causal else "full"]
        if self.mask != "none":
            parts.append(self.mask)
        if self.dropout_p > 0:
            parts.append(f"dropout{self.dropout_p:g}")
        return "+".join(parts)

    @property
    def flops(self) -> float:
        """4 b h sq sk d forward, half of it if causal, 2.5 times that backward."""
        pairs = self.batch * self.heads * self.seqlen_q * self.seqlen_k
        forward = 2.0 * pairs * (self.head_dim + self.head_dim_v)
        return forward * (0.5 if self.causal else 1.0) * DIRECTION_WORK[self.direction]

    @property
    def score_bytes(self) -> int:
        """Size of one (batch, heads, seqlen_q, seqlen_k) tensor: what fused attention never has."""
        pairs = self.batch * self.heads * self.seqlen_q * self.seqlen_k
        return pairs * ELEMENT_BYTES[self.dtype]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of q, k, v and out together."""
        per_row_q = self.head_dim + self.head_dim_v
        rows_q = self.batch * self.heads * self.seqlen_q
        rows_k = self.batch * self.heads_k * self.seqlen_k
        return (rows_q * per_row_q + rows_k * per_row_q) * ELEMENT_BYTES[self.dtype]


def self_attention(
    direction: str,
    dtype: str,
    shape: tuple[int, int, int],
    seqlen: int,
    head_dim: int,
    *,
    causal: bool = False,
    head_dim_v: int | None = None,
    mask: str = "none",
    dropout_p: float = 0.0,
) -> Case:
    """A case with as many keys as queries; shape is (batch, heads, heads_k)."""
    batch, heads, heads_k = shape
    return Case(
        direction,
        dtype,
        batch,
        heads,
        heads_k,
        seqlen,
        seqlen,
        head_dim,
        head_dim if head_dim_v is None else head_dim_v,
        causal,
        mask,
        dropout_p,
    )


_POWERS = (512, 1024, 2048, 4096, 8192, 16384)


def cpu() -> Iterator[Case]:
    """Every axis of a CPU user's life: precision, direction, mask, head dim, length, heads."""
    shapes = [(1, 8, 8), (2, 16, 16), (1, 8, 2), (1, 1, 1)]
    for dtype, direction, causal, dim, seqlen, shape in itertools.product(
        ("fp32", "bf16"),
        ("forward", "both"),
        (False, True),
        (64, 128),
        (128, 512, 1024, 2048, 4096),
        shapes,
    ):
        yield self_attention(direction, dtype, shape, seqlen, dim, causal=causal)
    for dtype, dim, keys in itertools.product(("fp32", "bf16"), (64, 128), (1024, 4096, 16384)):
        yield Case("forward", dtype, 1, 32, 8, 1, keys, dim, dim)


def cpu_core() -> Iterator[Case]:
    """The part of `cpu` with eight heads from 512 to 2048 tokens: about a minute and a half."""
    for case in cpu():
        if (case.batch, case.heads, case.heads_k) == (1, 8, 8) and 512 <= case.seqlen_q <= 2048:
            yield case


def cpu_fallback() -> Iterator[Case]:
    """What torch's fused CPU kernel refuses, so that torch computes whole score matrices."""
    for dtype, direction, seqlen in itertools.product(
        ("fp32", "bf16"), ("forward", "both"), (512, 1024, 2048)
    ):
        shape = (1, 8, 8)
        yield self_attention(direction, dtype, shape, seqlen, 64, dropout_p=0.1)
        yield self_attention(direction, dtype, shape, seqlen, 64, head_dim_v=128)
        yield self_attention(direction, dtype, shape, seqlen, 64, mask="bool")
        if direction == "both":
            yield self_attention(direction, dtype, shape, seqlen, 64, mask="bias")


def _training_shapes(
    dtypes: tuple[str, ...],
    dims: tuple[int, ...],
    lengths: tuple[int, ...],
    tokens: int = 16384,
    head_dim_v: int | None = None,
) -> Iterator[Case]:
    """Forward and backward, full and causal, hidden size 2048 or the largest below."""
    for dtype, direction, dim, causal, seqlen in itertools.product(
        dtypes, ("forward", "backward"), dims, (False, True), lengths
    ):
        heads = 2048 // (head_dim_v or dim)
        shape = (tokens // seqlen, heads, heads)
        yield self_attention(
            direction, dtype, shape, seqlen, dim, causal=causal, head_dim_v=head_dim_v
        )


def cuda() -> Iterator[Case]:
    """bf16, 16k tokens in all, hidden size 2048: the shape that attention papers report."""
    yield from _training_shapes(("bf16",), (64, 128, 256), _POWERS)


def cuda_fp16() -> Iterator[Case]:
    yield from _training_shapes(("fp16",), (64, 128, 256), _POWERS)


def cuda_dims() -> Iterator[Case]:
    """The head dims between the powers of two, and DeepSeek's 192 with 128 of v."""
    yield from _training_shapes(("bf16",), (96, 192), _POWERS)
    yield from _training_shapes(("bf16",), (192,), _POWERS, head_dim_v=128)


def cuda_fp32() -> Iterator[Case]:
    yield from _training_shapes(("fp32",), (64, 128), (512, 1024, 2048, 4096), 8192)


def cuda_features() -> Iterator[Case]:
    """Masks, bias, dropout: what of torch's fused backends only the memory-efficient one takes."""
    for direction, dim, seqlen in itertools.product(
        ("forward", "backward"), (64, 128, 256), (1024, 4096)
    ):
        shape = (16384 // seqlen, 2048 // dim, 2048 // dim)
        for mask in MASKS:
            if mask == "bias" and direction == "forward":
                continue
            dropout_p = 0.1 if mask == "none" else 0.0
            yield self_attention(
                direction, "bf16", shape, seqlen, dim, mask=mask, dropout_p=dropout_p
            )


def smoke() -> Iterator[Case]:
    """Seconds on any machine: shows that the tool works, measures nothing worth reporting."""
    for direction, causal in itertools.product(DIRECTIONS, (False, True)):
        yield self_attention(direction, "fp32", (1, 2, 2), 64, 32, causal=causal)
    yield self_attention("both", "fp32", (1, 4, 2), 64, 32, mask="bias")
    yield self_attention("forward", "fp32", (1, 2, 2), 64, 32, dropout_p=0.1, head_dim_v=16)


SUITES: dict[str, Callable[[], Iterator[Case]]] = {
    "cpu": cpu,
    "cpu-core": cpu_core,
    "cpu-fallback": cpu_fallback,
    "cuda": cuda,
    "cuda-dims": cuda_dims,
    "cuda-features": cuda_features,
    "cuda-fp16": cuda_fp16,
    "cuda-fp32": cuda_fp32,
    "smoke": smoke,
}
