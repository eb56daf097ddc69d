# SPDX-License-Identifier: BSD-3-Clause
"""The samples of a vmap over attention as one call of the op.

The mapped dimension is folded into one that the op already has: into the batch of dense tensors (a
view, where the mapped dimension leads), or, for packed tensors and where there are sinks, which
have no batch dimension, into the heads. What cannot be folded (mapped sequence bounds, a dropout
mask shared by all samples) runs sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tensors(NamedTuple):
    """The tensor arguments of the forward op, in its order."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sink: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    rng_state: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """What a Function needs besides tensors. `drawn`: rng_state was drawn for this very call, so
    vmap's randomness="different" is free to give every sample a mask of its own."""

    scalars: tuple[Any, ...]
    dropout_p: float
    drawn: bool
    deterministic: bool = False
    average: bool = False


@dataclass(frozen=True)
class Fold:
    """N samples as one call: the mapped dimension goes in front of the batch or the heads, and
    the two become one."""

    samples: int
    by_heads: bool
    packed: bool
    full: int  # size of the dimension folded into: batch, or query heads

    @staticmethod
    def of(
        info: Any, tensors: Tensors, dims: Any, call: Call, *, drawn_inside: bool
    ) -> Fold | None:
        """None where only sample after sample gives the right answer."""
        packed = tensors.cu_seqlens_q is not None
        by_heads = packed or tensors.sink is not None
        if dims.cu_seqlens_q is not None or dims.cu_seqlens_k is not None:
            return None
        if by_heads and (dims.seqused_q is not None or dims.seqused_k is not None):
            return None
        own_mask = call.drawn and drawn_inside and info.randomness == "different"
        if call.dropout_p > 0 and (dims.rng_state is not None or not own_mask):
            return None
        axis = 1 if by_heads else 0
        q_shape = list(tensors.q.shape)
        if dims.q is not None:
            del q_shape[dims.q % len(q_shape)]
        return Fold(info.batch_size, by_heads, packed, q_shape[axis])

    def axis(self, name: str) -> int:
        """The dimension of an unmapped tensor that its samples are folded into."""
        if not self.by_heads or name == "sink":
            return 0
        if name == "lse":
            return 0 if self.packed else 1
        return -1 if name == "alibi_slopes" else 1

    def fold(self, name: str, x: Tensor | None, dim: int | None, *, always: bool = True) -> Any:
        """Folds x, mapped along `dim`. Unless `always`, what broadcasts anyway stays as it is."""
        if x is None:
            return None
        given, axis = x, self.axis(name)
        x = x.movedim(dim, 0) if dim is not None else x[None]  # the samples in front
        if name == "alibi_slopes" and not self.by_heads and x.dim() == 2:
            x, broadcasts = x[:, None], True  # (N, H): the same for every sequence of the batch
        else:
            broadcasts = name in ("bias", "mask") and x.shape[axis + 1] == 1
        if dim is None and not always and broadcasts:
            return given
        axis = axis if axis >= 0 else x.dim() - 1 + axis
        shape = [self.samples, *x.shape[1:]]
        shape[axis + 1] = self.full if broadcasts else shape[axis + 1]
        return x.expand(shape).movedim(0, axis).flatten(axis, axis + 1)

    def tensors(
        self,
        tensors: Tensors,
        dims: Any,
        *,
        dbias: bool = False,
        dslopes: bool = False,
        dsink: bool = False,
    ) -> list[Any]:
        """All of a call's tensors. A gradient is wanted per sample, so its input is folded even
        where it would broadcast."""
        always = {"bias": dbias, "mask": False, "alibi_slopes": dslopes}
        result = []
        for name, x, dim in zip(Tensors._fields, tensors, dims, strict=True):
            by_sequence = name.startswith(("cu_seqlens", "seqused"))
            if name == "rng_state" or (self.by_heads and by_sequence):
                result.append(x)
            else:
                result.append(self.fold(name, x, dim, always=always.get(name, True)))
        return result

    def unfold(self, y: Tensor, axis: int) -> Tensor:
        shape = list(y.shape)
        shape[axis : axis + 1] = [self.samples, y.shape[axis] // self.samples]
        return y.view(shape)

    def gradient(
        self, name: str, gradient: Tensor, given: Tensor, dim: int | None
    ) -> tuple[Tensor, int]:
        """A folded gradient as (one per sample, its mapped dimension), in the input's own shape."""
        axis = self.axis(name) % gradient.dim()
        gradient = self.unfold(gradient, axis)
        rank = given.dim() - (dim is not None)
        if gradient.dim() - 1 > rank:  # slopes (H) that were repeated over the batch
            return gradient.sum(axis + 1), axis
        sizes = list(given.shape)
        if dim is not None:
            del sizes[dim % len(sizes)]
        if sizes[axis] != gradient.shape[axis + 1]:
            gradient = gradient.sum(axis + 1, keepdim=True)
        return gradient, axis


def as_tensors(weights_inputs: Any) -> Any:
    """(q, k, lse, bias, mask, alibi_slopes, rng_state) in the places of `Tensors`; v is k there."""
    q, k, _, bias, mask, alibi_slopes, rng_state = weights_inputs
    return Tensors(q, k, k, bias, mask, alibi_slopes, rng_state=rng_state)


def each_sample(
    apply: Callable[..., Any], samples: int, in_dims: Any, args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """One call per sample, the results stacked in front."""
    results = [
        apply(
            *(
                x.select(dim, i) if isinstance(dim, int) else x
                for x, dim in zip(args, in_dims, strict=True)
            )
        )
        for i in range(samples)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    columns = tuple(torch.stack(column) for column in zip(*results, strict=True))
    return columns, (0,) * len(columns)
