# SPDX-License-Identifier: BSD-3-Clause
"""The raw ops under torch.func: vmap, grad, vjp, jacrev and their compositions.

C++ autograd Functions refuse functorch transforms, so `attention` and `attention_weights` call the
C++ op where no transform is active and a Python `torch.autograd.Function` over the raw forward and
backward ops where one is. The backward is a Function of its own, since jacrev and vmap(grad(f)) map
over it. How a vmap becomes one call is in _vmap.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad

from . import _ops as _ops  # loads the extension, which registers torch.ops.flash_attn
from ._vmap import Call, Fold, Tensors, as_tensors, each_sample

__all__ = ["attention", "attention_weights", "draw_rng_state", "transforming"]

NO_FORWARD_AD = (
    "flash_attn: forward-mode AD (torch.func.jvp, jacfwd, hessian, torch.autograd.forward_ad) is "
    "not implemented for attention yet; use reverse mode (torch.func.vjp, jacrev), or the softmax "
    "formula in torch operations"
)
NO_DOUBLE_BACKWARD = "derivative for flash_attn::_bwd is not implemented"
NO_RANDOMNESS = (
    "vmap: called random operation while in randomness error mode. Please either use the 'same' "
    "or 'different' randomness flags on vmap or perform the randomness operation out of vmap"
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    rng_state: Tensor | None = None,
    rng_state_drawn: bool = False,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    bottom_right: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    prefix: int = 0,
    scale: float = 1.0,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """`torch.ops.flash_attn.attention`, under transforms or not; returns (out, lse).

    `rng_state_drawn` says that rng_state comes from `draw_rng_state` for this call alone.
    """
    tensors = (
        q, k, v, bias, mask, alibi_slopes, sink, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
        rng_state,
    )  # fmt: skip
    scalars = (
        max_seqlen_q, max_seqlen_k, bottom_right, window_left, window_right, prefix, scale,
        softcap, dropout_p,
    )  # fmt: skip
    if not transforming():
        out, lse = torch.ops.flash_attn.attention(*tensors, *scalars, deterministic)
        return out, lse
    call = Call(scalars, dropout_p, rng_state_drawn, deterministic)
    out, lse = _apply(_Attention, *autocast(*tensors[:4]), *tensors[4:], call)
    return out, lse


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    rng_state: Tensor | None = None,
    rng_state_drawn: bool = False,
    bottom_right: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    prefix: int = 0,
    scale: float = 1.0,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    average: bool = True,
) -> Tensor:
    """`torch.ops.flash_attn.attention_weights`, under transforms or not."""
    tensors = (q, k, lse, bias, mask, alibi_slopes, rng_state)
    scalars = (bottom_right, window_left, window_right, prefix, scale, softcap, dropout_p)
    if not transforming():
        weights: Tensor = torch.ops.flash_attn.attention_weights(*tensors, *scalars, average)
        return weights
    call = Call(scalars, dropout_p, rng_state_drawn, average=average)
    q, k, bias = autocast(q, k, bias)
    weights = _apply(_Weights, q, k, lse, bias, mask, alibi_slopes, rng_state, call)
    return weights


def draw_rng_state(increment: int, *like: Tensor | None) -> Tensor:
    """A fresh dropout state, int64 (seed, offset), for a call on the tensors `like`.

    Args:
        increment: by how many streams, batch * query heads, the generator advances.
        like: all tensors of the call; the first says where the generator lives, and whether any
            of them is mapped says whether vmap's randomness flag applies.
    """
    state: Tensor
    if transforming():
        state = _apply(_DrawRngState, increment, *like)
    else:
        state = torch.ops.flash_attn.rng_state(like[0], increment)
    return state


def transforming() -> bool:
    """Whether a torch.func transform or a level of forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply`; the variant with a jvp only under forward-mode AD, since torch.compile
    takes no Function that has one. It takes none under nested transforms, vmap(grad(f)): there a
    graph break leaves the call to eager mode, instead of an internal error."""
    if torch.compiler.is_dynamo_compiling() and _nested_transforms():
        torch._dynamo.graph_break("attention under nested torch.func transforms")
    if forward_ad._current_level >= 0:
        function = _WITH_JVP[function]
    apply: Callable[..., Any] = function.apply
    return apply(*args)


def _nested_transforms() -> bool:
    active = torch._C._are_functorch_transforms_active()
    return active and retrieve_current_functorch_interpreter().level() > 1


def autocast(*tensors: Any) -> Any:
    """What the Autocast keys of the ops do: the floating-point tensors in autocast's dtype,
    float64 as it is. The first is never None."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    eligible = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(t.to(dtype) if t is not None and t.dtype in eligible else t for t in tensors)


class _Attention(torch.autograd.Function):
    """(*Tensors, call) -> (out, lse). torch.compile counts the parameters of forward."""

    @staticmethod
    def forward(
        q: Any, k: Any, v: Any, bias: Any, mask: Any, alibi_slopes: Any, sink: Any,
        cu_seqlens_q: Any, cu_seqlens_k: Any, seqused_q: Any, seqused_k: Any, rng_state: Any,
        call: Call,
    ) -> Any:  # fmt: skip
        tensors = (
            q, k, v, bias, mask, alibi_slopes, sink, cu_seqlens_q, cu_seqlens_k, seqused_q,
            seqused_k, rng_state,
        )  # fmt: skip
        return torch.ops.flash_attn._fwd(*tensors, *call.scalars)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.call = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if all(g is None for g in grads):
            return (None,) * (len(Tensors._fields) + 1)
        positions = (0, 1, 2, 3, 5, 6)  # q, k, v, bias, alibi_slopes, sink
        needs = tuple(bool(ctx.needs_input_grad[i]) for i in positions)
        found = _apply(_AttentionBackward, *grads, *ctx.saved_tensors, ctx.call, needs)
        result: list[Tensor | None] = [None] * (len(Tensors._fields) + 1)
        for i, gradient, needed in zip(positions, found, needs, strict=True):
            result[i] = gradient if needed else None
        return tuple(result)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        *tensors, call = args
        given, dims = Tensors(*tensors), Tensors(*in_dims[:-1])
        fold = Fold.of(info, given, dims, call, drawn_inside=True)
        if fold is None:
            return each_sample(partial(_apply, _Attention), info.batch_size, in_dims, args)
        out, lse = _apply(_Attention, *fold.tensors(given, dims), call)
        outputs = fold.unfold(out, fold.axis("q")), fold.unfold(lse, fold.axis("lse"))
        return outputs, (fold.axis("q"), fold.axis("lse"))


class _AttentionBackward(torch.autograd.Function):
    """(dout, dlse, *Tensors, out, lse, call, needs) -> (dq, dk, dv, dbias, dslopes, dsink)."""

    @staticmethod
    def forward(
        dout: Any, dlse: Any, q: Any, k: Any, v: Any, bias: Any, mask: Any, alibi_slopes: Any,
        sink: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, seqused_q: Any, seqused_k: Any,
        rng_state: Any, out: Any, lse: Any, call: Call, needs: tuple[bool, ...],
    ) -> Any:  # fmt: skip
        tensors = (
            q, k, v, bias, mask, alibi_slopes, sink, cu_seqlens_q, cu_seqlens_k, seqused_q,
            seqused_k, rng_state,
        )  # fmt: skip
        return torch.ops.flash_attn._bwd(
            dout, dlse, *tensors, *call.scalars, out, lse, call.deterministic, needs
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(NO_DOUBLE_BACKWARD)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        dout, dlse, *tensors, out, lse, call, needs = args
        dout_dim, dlse_dim, *tensor_dims, out_dim, lse_dim, _, _ = in_dims
        given, dims = Tensors(*tensors), Tensors(*tensor_dims)
        # Where out is not mapped, the forward ran outside of this vmap: one mask for all samples.
        fold = Fold.of(info, given, dims, call, drawn_inside=out_dim is not None)
        if fold is None:
            outputs, _ = each_sample(
                partial(_apply, _AttentionBackward), info.batch_size, in_dims, args
            )
            return outputs, tuple(0 if needed else None for needed in needs)
        results = _apply(
            _AttentionBackward,
            fold.fold("q", dout, dout_dim),
            fold.fold("lse", dlse, dlse_dim),
            *fold.tensors(given, dims, dbias=needs[3], dslopes=needs[4], dsink=needs[5]),
            fold.fold("q", out, out_dim),
            fold.fold("lse", lse, lse_dim),
            call,
            needs,
        )
        names = ("q", "k", "v", "bias", "alibi_slopes", "sink")
        pairs = [
            fold.gradient(name, gradient, getattr(given, name), getattr(dims, name))
            if needed
            else (gradient, None)
            for name, gradient, needed in zip(names, results, needs, strict=True)
        ]
        return tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)


class _Weights(torch.autograd.Function):
    """(q, k, lse, bias, mask, alibi_slopes, rng_state, call) -> weights."""

    @staticmethod
    def forward(
        q: Any, k: Any, lse: Any, bias: Any, mask: Any, alibi_slopes: Any, rng_state: Any,
        call: Call,
    ) -> Any:  # fmt: skip
        tensors = (q, k, lse, bias, mask, alibi_slopes, rng_state)
        return torch.ops.flash_attn.attention_weights(*tensors, *call.scalars, call.average)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.call = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dq, dk, dlse, dbias = _apply(_WeightsBackward, *grads, *ctx.saved_tensors, ctx.call)
        return dq, dk, dlse, dbias if ctx.needs_input_grad[3] else None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        _, _, lse, _, _, _, rng_state, call = args
        given, dims = as_tensors(args[:-1]), as_tensors(in_dims[:-1])
        fold = Fold.of(info, given, dims, call, drawn_inside=True)
        if fold is None:
            return each_sample(partial(_apply, _Weights), info.batch_size, in_dims, args)
        t = Tensors(*fold.tensors(given, dims))
        lse = fold.fold("lse", lse, in_dims[2])
        weights = _apply(
            _Weights, t.q, t.k, lse, t.bias, t.mask, t.alibi_slopes, rng_state, call
        )  # fmt: skip
        return fold.unfold(weights, 0), 0


class _WeightsBackward(torch.autograd.Function):
    """(dweights, q, k, lse, bias, mask, alibi_slopes, rng_state, call) -> (dq, dk, dlse, dbias)."""

    @staticmethod
    def forward(
        dweights: Any, q: Any, k: Any, lse: Any, bias: Any, mask: Any, alibi_slopes: Any,
        rng_state: Any, call: Call,
    ) -> Any:  # fmt: skip
        tensors = (dweights, q, k, lse, bias, mask, alibi_slopes, rng_state)
        return torch.ops.flash_attn._attention_weights_bwd(*tensors, *call.scalars, call.average)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("derivative for flash_attn::_attention_weights_bwd is not implemented")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        dweights, _, _, lse, bias, _, _, rng_state, call = args
        given, dims = as_tensors(args[1:-1]), as_tensors(in_dims[1:-1])
        fold = Fold.of(info, given, dims, call, drawn_inside=in_dims[3] is not None)
        if fold is None:
            outputs, _ = each_sample(
                partial(_apply, _WeightsBackward), info.batch_size, in_dims, args
            )
            return outputs, (0, 0, 0, None if bias is None else 0)
        t = Tensors(*fold.tensors(given, dims, dbias=True))
        dq, dk, dlse, dbias = _apply(
            _WeightsBackward, fold.fold("q", dweights, in_dims[0]), t.q, t.k,
            fold.fold("lse", lse, in_dims[3]), t.bias, t.mask, t.alibi_slopes, rng_state, call,
        )  # fmt: skip
        dbias_dim = None
        if bias is not None:
            dbias, dbias_dim = fold.gradient("bias", dbias, bias, dims.bias)
        return (*(fold.unfold(x, 0) for x in (dq, dk, dlse)), dbias), (0, 0, 0, dbias_dim)


class _DrawRngState(torch.autograd.Function):
    """(increment, *like) -> rng_state, one for all samples of a vmap."""

    @staticmethod
    def forward(*args: Any) -> Any:
        increment, *like = args
        return torch.ops.flash_attn.rng_state(like[0], increment)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.num_inputs = len(inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None,) * ctx.num_inputs

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        increment, *like = args
        if info.randomness == "error":
            raise RuntimeError(NO_RANDOMNESS)
        if info.randomness == "different":
            increment *= info.batch_size
        return _apply(_DrawRngState, increment, *like), None


class _NoJvp:
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(NO_FORWARD_AD)


class _AttentionWithJvp(_NoJvp, _Attention): ...


class _AttentionBackwardWithJvp(_NoJvp, _AttentionBackward): ...


class _WeightsWithJvp(_NoJvp, _Weights): ...


class _WeightsBackwardWithJvp(_NoJvp, _WeightsBackward): ...


class _DrawRngStateWithJvp(_DrawRngState):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return None


_WITH_JVP: dict[type[torch.autograd.Function], type[torch.autograd.Function]] = {
    _Attention: _AttentionWithJvp,
    _AttentionBackward: _AttentionBackwardWithJvp,
    _Weights: _WeightsWithJvp,
    _WeightsBackward: _WeightsBackwardWithJvp,
    _DrawRngState: _DrawRngStateWithJvp,
}
