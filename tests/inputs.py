# SPDX-License-Identifier: BSD-3-Clause
"""The tensors of a case. The same numbers on every device; memory that no result may depend on
(rows owned by no sequence, rows beyond seqused, gaps between strided rows) is filled with NaN.
"""

import dataclasses
import math
import zlib

import torch
from cases import SEED, Case

DIFFERENTIABLE = ("q", "k", "v", "bias", "alibi_slopes", "sink")


@dataclasses.dataclass
class Inputs:
    case: Case
    dtype: torch.dtype
    tensors: dict[str, torch.Tensor]  # by the operator's argument names
    options: dict[str, object]
    dout: torch.Tensor
    dlse: torch.Tensor

    def differentiable(self):
        return [name for name in DIFFERENTIABLE if name in self.tensors]

    def upcast(self, dtype):
        """Contiguous copies whose floating dtype is `dtype`, slopes and sink included."""

        def cast(t):
            return t.detach().to(dtype).clone() if t.is_floating_point() else t

        tensors = {name: cast(t) for name, t in self.tensors.items()}
        return dataclasses.replace(
            self, tensors=tensors, dout=cast(self.dout), dlse=cast(self.dlse)
        )

    def call(self, operator, **more):
        return operator(**self.tensors, **self.options, **more)


class _Source:
    """Random tensors from one seed: the same numbers on every device."""

    def __init__(self, name):
        self.generator = torch.Generator().manual_seed(SEED * 1000003 + zlib.crc32(name.encode()))

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def coins(self, p, *shape):
        return torch.rand(shape, generator=self.generator) < p


def _lay_out(values, layout, expand=False):
    """`values` (B, H, L, E) as a tensor of the wanted strides."""
    batch, heads, length, dim = values.shape
    if layout == "blhd":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "lbhd":
        return values.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    if layout == "sliced":
        storage = values.new_full((batch, heads + 1, length + 3, dim + 5), math.nan)
        view = storage[:, 1:, 2 : length + 2, 3 : dim + 3]
        return view.copy_(values)
    if layout == "last_dim_strided":
        storage = values.new_full((batch, heads, length, 2 * dim), math.nan)
        return storage[..., ::2].copy_(values)
    if layout == "expanded" and expand:
        return values[:1, :1].expand(batch, heads, length, dim)
    return values.contiguous()


def _fill_values(case, q, k, v, dtype):
    if case.values == "times_10":
        q, k, v = q * 10, k * 10, v * 10
    elif case.values == "offset":
        q, k = q * 0.3, k * 0.3
        q[..., 0], k[..., 0] = 100, 100
    elif case.values == "value_offset":
        v = v + 10
    elif case.values == "equal":
        q, k = torch.ones_like(q), torch.ones_like(k)
    elif case.values == "dominating":
        k[..., k.shape[-2] // 2, :] *= 30
    elif case.values == "huge":
        q, k = (133120.0 * (1 + x.frac().abs()) / 2 for x in (q, k))
        k[..., ::2, :] *= -1
    elif case.values == "subnormal":
        tiny = torch.finfo(dtype).smallest_normal / 16
        q, k, v = q * tiny, k, v * tiny
    return q, k, v


def _pair_shape(letters, case, seqlen_q, seqlen_k):
    full = {"b": case.batch, "h": case.heads, "q": seqlen_q, "k": seqlen_k}
    return [full[letter] if letter in letters else 1 for letter in "bhqk"]


def _make_bias(case, source, dtype):
    bias = source.normal(*_pair_shape(case.bias, case, case.seqlen_q, case.seqlen_k))
    if case.bias_values == "minus_inf":
        bias = bias.masked_fill(source.coins(0.3, *bias.shape), -math.inf)
        bias[:, :, 3] = -math.inf
    elif case.bias_values == "lowest":
        bias[..., bias.shape[-1] // 3 :] = torch.finfo(dtype).min / 2
    elif case.bias_values == "large":
        bias = bias + 1e4
    return bias.to(torch.float32 if case.bias_dtype == "float32" else dtype)


def _make_mask(case, source):
    shape = _pair_shape(case.mask, case, case.seqlen_q, case.seqlen_k)
    if case.mask_values == "nothing":
        return torch.zeros(shape, dtype=torch.bool)
    mask = source.coins(0.6, *shape)
    if case.mask_values == "padding":
        lengths = torch.randint(1, shape[-1] + 1, (shape[0], 1, 1, 1), generator=source.generator)
        mask = torch.arange(shape[-1]) < lengths
    elif case.mask_values == "runs":  # padded at both ends, some of them all the way
        ends = torch.randint(-5, shape[-1] + 6, (*shape[:3], 2), generator=source.generator)
        begin, end = ends.sort(-1).values[..., None].unbind(-2)
        key = torch.arange(shape[-1])
        mask = (key >= begin) & (key < end)
    elif case.mask_values == "empty_rows":
        mask[:, :, ::7] = False
        mask[0] = False
    return mask


def _accumulation(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pack(values, lengths, unowned):
    """(B, H, L, E) -> (T, H, E) with the rows of each sequence one after another."""
    rows = [values[b, :, :length].transpose(0, 1) for b, length in enumerate(lengths)]
    tail = values.new_full((unowned, values.shape[1], values.shape[3]), math.nan)
    return torch.cat([*rows, tail])


def _poison_unused_rows(case, q, k, v, dout):
    for used, tensors in ((case.seqused_q, (q, dout)), (case.seqused_k, (k, v))):
        for b, length in enumerate(used or ()):
            for t in tensors:
                t[b, :, length:] = math.nan


def _poison_unused_pairs(case, bias):
    for b, length in enumerate(case.seqused_k or ()):
        if "b" in case.bias and "k" in case.bias:
            bias[b, :, :, length:] = math.nan
    return bias


def make_inputs(case, dtype_name, device="cpu"):
    dtype, source = getattr(torch, dtype_name), _Source(case.name + dtype_name)
    packed = case.lengths_q is not None
    if packed:
        case = dataclasses.replace(
            case, batch=len(case.lengths_q), seqlen_q=max(case.lengths_q),
            seqlen_k=max(case.lengths_k),
        )  # fmt: skip
    heads_k = case.heads if case.heads_k is None else case.heads_k
    dim_v = case.head_dim if case.head_dim_v is None else case.head_dim_v
    q = source.normal(case.batch, case.heads, case.seqlen_q, case.head_dim)
    k = source.normal(case.batch, heads_k, case.seqlen_k, case.head_dim)
    v = source.normal(case.batch, heads_k, case.seqlen_k, dim_v)
    dout = source.normal(case.batch, case.heads, case.seqlen_q, dim_v)
    q, k, v = _fill_values(case, q, k, v, dtype)
    _poison_unused_rows(case, q, k, v, dout)
    q, k, v, dout = (t.to(device, dtype) for t in (q, k, v, dout))

    tensors, options = {}, {}
    if packed:
        tensors["q"] = _pack(q, case.lengths_q, case.unowned)
        tensors["k"] = _pack(k, case.lengths_k, case.unowned)
        tensors["v"] = _pack(v, case.lengths_k, case.unowned)
        dout = _pack(dout, case.lengths_q, case.unowned)
        for name, lengths in (("q", case.lengths_q), ("k", case.lengths_k)):
            ends = torch.tensor((0, *lengths)).cumsum(0)
            tensors[f"cu_seqlens_{name}"] = ends.to(torch.int32)
            options[f"max_seqlen_{name}"] = max(lengths)
        lse_shape = (case.heads, tensors["q"].shape[0])
    else:
        tensors["q"] = _lay_out(q, case.layout)
        tensors["k"] = _lay_out(k, case.layout, expand=True)
        tensors["v"] = _lay_out(v, case.layout, expand=True)
        lse_shape = (case.batch, case.heads, case.seqlen_q)
    for name, used in (("seqused_q", case.seqused_q), ("seqused_k", case.seqused_k)):
        if used is not None:
            tensors[name] = torch.tensor(used, dtype=torch.int32)
    if case.bias is not None:
        tensors["bias"] = _poison_unused_pairs(case, _make_bias(case, source, dtype))
    if case.mask is not None:
        tensors["mask"] = _make_mask(case, source)
    if case.alibi is not None:
        shape = (case.batch, case.heads) if case.alibi == "bh" else (case.heads,)
        tensors["alibi_slopes"] = (source.normal(*shape).abs() * 0.2).to(_accumulation(dtype))
    if case.sink:
        tensors["sink"] = source.normal(case.heads).to(_accumulation(dtype))
    if case.dropout_p > 0:
        options["dropout_p"] = case.dropout_p
        state = torch.randint(-(2**62), 2**62, (1,), generator=source.generator)
        tensors["rng_state"] = torch.cat([state, torch.tensor([4])])
    _mask_options(case, options)
    options["scale"] = case.head_dim**-0.5 if case.scale is None else case.scale
    if case.softcap:
        options["softcap"] = case.softcap
    tensors = {name: t.to(device) for name, t in tensors.items()}
    dlse = source.normal(*lse_shape).to(device, _accumulation(dtype))
    return Inputs(case, dtype, tensors, options, dout, dlse)


def _mask_options(case, options):
    left, right = case.window
    if case.causal is not None:
        right = 0
    if left is not None:
        options["window_left"] = left
    if right is not None:
        options["window_right"] = right
    if case.causal == "bottom_right":
        options["bottom_right"] = True
    if case.prefix:
        options["prefix"] = case.prefix
