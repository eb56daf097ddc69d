# SPDX-License-Identifier: BSD-3-Clause
"""The tolerance of every comparison, once (docs: numerical promises).

`ref` is the formula in float64 on the exactly upcast inputs; `eager` the same formula step by step
in the tested dtype. A result passes when its error is at most twice that of `eager`, plus one
rounding of the largest value, in the maximum and in the root of the mean square. `eager` can be
lucky, down to an error of 0; so there are four allowances, each with its reason:

- Few rows, or few values as their head_dim is small: each score may be off by its last two bits,
  (1 + max|s|) 2^-22, more for a head_dim beyond 64, as a sum of random roundings grows; times the
  terms that a result is a sum of.
- Gradients of float32: P is computed anew as exp(s - lse), where eager has it exactly normalised;
  the same error of a score, times the largest gradient.
- All gradients but dv: delta = rowsum(dO o O) carries the rounding of out, where eager has the sum
  before it, and of float32 those of all partial sums, of out and its own, which outgrow delta where
  values have an offset: twice what such an error of delta, drawn at random, makes of the gradient.
- Gradients of float32 with a few keys: of a row with one key eager has dP - dP = 0, exactly, where
  we subtract two sums of d_v products, delta from dP. Each is off by some last bits of the largest
  dP, sqrt(d_v) / 4 of them, as roundings add up like a random walk. (Of 6000 random problems on
  the CPU, 15 failed for this reason or were within a third of the bound.)

float64 has no better reference than itself: all sums there may be off by 2^-49 of their terms.
"""

import dataclasses
import functools
import math
import os

import torch
from cases import SEED
from inputs import Inputs, make_inputs

from flash_attn import reference

UNIT = {
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}
FEW_ROWS = 1024
FEW_VALUES = 64 * FEW_ROWS
FEW_KEYS = 8
DRAWS = 4


@dataclasses.dataclass
class Result:
    out: torch.Tensor
    lse: torch.Tensor
    grads: dict[str, torch.Tensor]


@dataclasses.dataclass
class Truth:
    """What a case should give, and how far it may be missed."""

    inputs: Inputs
    ref: Result
    eager: Result
    lse_eager: torch.Tensor  # float32 formula on the upcast inputs
    max_score: float
    size: dict[str, float]  # of the terms that a result is a sum of
    noise: dict[str, torch.Tensor]  # of each element of a gradient, by the rounding of out


def run(operator, inputs, needs=None, grads=True, **more):
    """Calls `operator` on `inputs`; gradients of both outputs for `needs` (default: all)."""
    needs = inputs.differentiable() if needs is None else needs
    leaves = {name: inputs.tensors[name].detach().requires_grad_() for name in needs if grads}
    inputs = dataclasses.replace(inputs, tensors=inputs.tensors | leaves)
    out, lse = inputs.call(operator, **more)
    if not leaves:
        return Result(out.detach(), lse.detach(), {})
    got = torch.autograd.grad(
        (out, lse), tuple(leaves.values()), (inputs.dout, inputs.dlse), allow_unused=True
    )
    filled = (
        torch.zeros_like(t) if g is None else g for g, t in zip(got, leaves.values(), strict=True)
    )
    return Result(out.detach(), lse.detach(), dict(zip(leaves, filled, strict=True)))


@functools.cache
def truth(case, dtype_name, device):
    inputs = make_inputs(case, dtype_name, device)
    exact = inputs.upcast(torch.float64)
    in_float32 = inputs.upcast(torch.promote_types(inputs.dtype, torch.float32))
    sizes, max_score = natural_sizes(exact)
    ref = run(reference.attention, exact)
    return Truth(
        inputs,
        ref=ref,
        eager=run(reference.attention, inputs),
        lse_eager=run(reference.attention, in_float32, grads=False).lse,
        max_score=max_score,
        size=sizes,
        noise=noise_of_delta(exact, ref.out, inputs.dtype),
    )


def _largest(t):
    t = t[t.isfinite()]
    return t.abs().max().item() if t.numel() else 0.0


def natural_sizes(inputs):
    """Of each result, the size of the terms it is a sum of; and the largest |score|."""
    t, options = inputs.tensors, inputs.options
    q, k, v, dout = (x.nan_to_num(0) for x in (t["q"], t["k"], t["v"], inputs.dout))
    if "cu_seqlens_q" in t:
        q, k, v, dout = (x.transpose(0, 1) for x in (q, k, v, dout))
    repeats = q.shape[-3] // max(k.shape[-3], 1)
    k, v = (x.repeat_interleave(repeats, -3) for x in (k, v))
    score = abs(options["scale"]) * _largest(q @ k.mT)
    score = min(score, options.get("softcap") or math.inf)
    distance = max(q.shape[-2], k.shape[-2])
    if "bias" in t:
        score += _largest(t["bias"]) if _largest(t["bias"]) < 1e30 else 0
    if "alibi_slopes" in t:
        score += _largest(t["alibi_slopes"]) * distance
    dp = _largest(dout @ v.mT) + _largest(inputs.dlse)
    if 0 < options.get("dropout_p", 0) < 1:
        dp /= 1 - options["dropout_p"]
    ds = dp * abs(options["scale"])
    size = {"out": _largest(v), "v": _largest(dout), "q": ds * _largest(k), "k": ds * _largest(q)}
    size |= {"bias": dp, "sink": dp, "alibi_slopes": dp * distance, "lse": 1.0}
    return size, score


def noise_of_delta(inputs, out, dtype):
    """How far a gradient moves when out is rounded to dtype: delta = rowsum(dO o O) - dLSE is then
    off by about unit |(O dO)_i| in row i, with a sign of its own, which is to the gradients as if
    dLSE were. Two sums of float32 are rounded after each addition besides, by half a unit of what
    they are then: delta, and out itself, whose sum over n keys grows evenly to what it is, which
    leaves sqrt(n / 12) units. The largest of a few draws of the signs and of what rounding this out
    does, element by element: where few terms are summed, draws alone can all be balanced.
    """
    products = (out * inputs.dout).nan_to_num(0, 0, 0)
    rounding = ((out.to(dtype).to(out) - out) * inputs.dout).nan_to_num(0, 0, 0).sum(-1)
    squares = products.square()
    if dtype == torch.float32:
        keys = inputs.tensors["k"].shape[0 if "cu_seqlens_q" in inputs.tensors else -2]
        squares = squares * (1 + keys / 12) + (products.cumsum(-1) / 2).square()
    size = UNIT[dtype] * squares.sum(-1).sqrt()
    if "cu_seqlens_q" in inputs.tensors:
        size, rounding = size.mT, rounding.mT  # as lse lies
    leaves = {n: inputs.tensors[n].detach().requires_grad_() for n in inputs.differentiable()}
    _, lse = dataclasses.replace(inputs, tensors=inputs.tensors | leaves).call(reference.attention)
    generator = torch.Generator().manual_seed(SEED)
    noise = {}
    draws = (
        torch.randint(0, 2, lse.shape, generator=generator).to(size) * 2 - 1 for _ in range(DRAWS)
    )
    for move_of_delta in (rounding, *(size * signs for signs in draws)):
        moves = torch.autograd.grad(
            lse, tuple(leaves.values()), move_of_delta, retain_graph=True, allow_unused=True
        )
        for name, move in zip(leaves, moves, strict=True):
            if move is not None:
                move = move.nan_to_num(0, 0, 0).abs()
                noise[name] = torch.maximum(noise[name], move) if name in noise else move
    return noise


def reproduce():
    test = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
    return f"FLASH_ATTN_TEST_SEED={SEED} python -m pytest '{test}'"


def _fail(what, text):
    raise AssertionError(f"{what}: {text}\n  reproduce: {reproduce()}")


def check(what, ours, ref, eager, unit, allowance, relative=0.0, noise=None):
    """One tensor against the rule. Places that are not finite must be equal in kind."""
    if ours.shape != ref.shape:
        _fail(what, f"shape {tuple(ours.shape)}, expected {tuple(ref.shape)}")
    ours, eager = ours.double(), eager.double()
    overflows = ref.isfinite() & ~ours.isfinite() & (ours == eager)  # a cast to float16 beyond it
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        wrong = (kind(ours) != kind(ref)) & ~overflows
        if wrong.any():
            place = tuple(wrong.nonzero()[0].tolist())
            _fail(what, f"{ours[place].item()} at {place}, expected {ref[place].item()}"
                        f" ({int(wrong.sum())} such places)")  # fmt: skip
    finite = ref.isfinite() & ours.isfinite()
    if not finite.any():
        return
    ours, ref, eager = ours[finite], ref[finite], eager[finite].nan_to_num(0, 0, 0)
    noise = torch.zeros_like(ref) if noise is None else 2 * noise[finite]

    def largest(x):
        return x.abs().max().item()

    def root_mean_square(x):
        scale = x.abs().max()  # a tensor: CUDA divides by a number as it multiplies by 1 / it
        return (scale * (x / scale).square().mean().sqrt()).item() if scale else 0.0

    for norm in (largest, root_mean_square):
        error, eager_error = norm(ours - ref), norm(eager - ref)
        extra = allowance + norm(noise)
        bound = 2 * eager_error + (unit + relative) * norm(ref) + extra
        if not error <= bound:
            name = norm.__name__.replace("_", " ")
            _fail(what, f"{name} error {error:.3e} > {bound:.3e} = 2 * {eager_error:.3e} (eager) + "
                        f"{unit + relative:.1e} * {norm(ref):.3e} + {extra:.1e}")  # fmt: skip


def _score_error(true):
    head_dim = true.inputs.tensors["q"].shape[-1]
    last_bits = 2.0**-49 if true.inputs.dtype == torch.float64 else 2.0**-22
    return (1 + true.max_score) * last_bits * max(1.0, head_dim / 64) ** 0.5


def _allowance(true, name, tensor):
    """Absolute: the smallest numbers, and few rows."""
    dtype = true.inputs.dtype
    spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    if dtype == torch.float64:
        return 16 * spacing + _score_error(true) * max(true.size[name], _largest(tensor))
    rows = tensor.numel() // max(tensor.shape[-1], 1) if tensor.dim() else 1
    if rows > FEW_ROWS and tensor.numel() > FEW_VALUES:
        return 2 * spacing
    return 2 * spacing + _score_error(true) * true.size[name]


def _few_keys_error(true, name):
    inputs, case = true.inputs, true.inputs.case
    most_keys = max(case.lengths_k) if case.lengths_k else case.seqlen_k
    if inputs.dtype != torch.float32 or most_keys > FEW_KEYS:
        return 0.0
    last_bits = max(1.0, inputs.tensors["v"].shape[-1] ** 0.5 / 4)
    return 2 * last_bits * UNIT[torch.float32] * true.size[name]


def _what(true, name):
    return f"case {true.inputs.case.name} {true.inputs.dtype} {name}"


def check_forward(true, ours):
    unit = UNIT[true.inputs.dtype]
    allowance = _allowance(true, "out", true.ref.out)
    check(_what(true, "out"), ours.out, true.ref.out, true.eager.out, unit, allowance)
    check_lse(true, ours.lse)


def check_lse(true, lse):
    unit = UNIT[lse.dtype]
    last_bits = (16 if lse.dtype == torch.float64 else 4) * unit
    allowance = last_bits * max(1.0, true.max_score)
    check(_what(true, "lse"), lse, true.ref.lse, true.lse_eager, unit, allowance)


def check_grads(true, ours):
    unit = UNIT[true.inputs.dtype]
    relative = _score_error(true) if true.inputs.dtype == torch.float32 else 0.0
    for name, grad in ours.grads.items():
        leaf = true.inputs.tensors[name]
        if grad.dtype != leaf.dtype:
            _fail(_what(true, "d" + name), f"dtype {grad.dtype}, expected {leaf.dtype}")
        ref, eager = true.ref.grads[name], true.eager.grads[name]
        allowance = _allowance(true, name, ref) + _few_keys_error(true, name)
        noise = true.noise.get(name)
        check(_what(true, "d" + name), grad, ref, eager, unit, allowance, relative, noise)


def equal_bits(a, b):
    """Equality that tells -0 from 0 and takes NaN for equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))
