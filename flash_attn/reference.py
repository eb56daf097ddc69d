# SPDX-License-Identifier: BSD-3-Clause
"""The meaning of `flash_attn`: attention written out, one step a line, for every feature.

This is the specification. Kernels, tests and documentation refer to it; it refers to nothing of
ours. It materialises the scores, works in whatever dtype its inputs have (float64 inputs: the
exact answer; bfloat16 inputs: the formula with every step rounded, which is what an error is
measured against) and is differentiable by autograd, twice.

For query i and key j of sequence b, query head h (`diag` is the key on the diagonal of query 0):

1. s = scale * q_i . k_j                        5. a sink logit joins the denominator only
2. s = softcap * tanh(s / softcap)              6. p = exp(s - lse)
3. s = s + bias_ij - slope_h * |i + diag - j|   7. p = keep_ij * p / (1 - dropout_p)
4. s = -inf where masked                        8. o_i = sum_j p_ij v_j

lse = ln(sum_j exp(s_ij) + exp(sink_h)). A query that sees nothing has o = 0 and lse = -inf (the
sink, if there is one), and passes no gradient. What is masked is absent: a NaN in a masked key
reaches neither the output nor any gradient.

Sources: Dao et al., FlashAttention (2022), algorithm 0; Press et al., ALiBi (2022); Salmon et al.,
Parallel Random Numbers: As Easy as 1, 2, 3 (2011), Philox.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["attention", "attention_weights", "dropout_keep"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    rng_state: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    bottom_right: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    prefix: int = 0,
    scale: float = 1.0,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention with every feature; the arguments are those of `torch.ops.flash_attn.attention`.

    Args:
        q, k, v: (B, Hq, Lq, E), (B, Hk, Lk, E), (B, Hk, Lk, Ev), Hq a multiple of Hk; packed, with
            `cu_seqlens_*` (B + 1): (Tq, Hq, E), (Tk, Hk, E), (Tk, Hk, Ev).
        bias, mask: (B, Hq, Lq, Lk), any of the sizes 1; a float added, a bool that keeps.
        alibi_slopes: (Hq) or (B, Hq).  sink: (Hq).
        seqused_q, seqused_k: (B), lengths that cut the sequences short.
        rng_state: int64 (seed, offset), needed for `dropout_p` > 0.
        bottom_right: the diagonal ends at the last key, diag = Lk - Lq; else diag = 0.
        window_left, window_right: keys before and after the diagonal that are seen, inclusive;
            None: all. Causal is `window_right=0`.
        prefix: every query sees this many first keys, if its left window reaches them.

    Returns:
        out (B, Hq, Lq, Ev) or (Tq, Hq, Ev), dtype of q; lse (B, Hq, Lq) or (Hq, Tq), float32, or
        float64 for float64 inputs. Rows outside every sequence: 0 and -inf.
    """
    options: dict[str, Any] = {
        "sink": sink, "rng_state": rng_state, "dropout_p": dropout_p,
        "bottom_right": bottom_right, "window_left": window_left, "window_right": window_right,
        "prefix": prefix, "scale": scale, "softcap": softcap,
    }  # fmt: skip
    packed = cu_seqlens_q is not None
    if not packed and seqused_q is None and seqused_k is None:
        return _dense(q, k, v, bias, mask, alibi_slopes, **options)

    out = q.new_zeros(q.shape[:-1] + v.shape[-1:])
    rows_shape = (q.shape[1], q.shape[0]) if packed else q.shape[:3]
    lse = torch.full(rows_shape, -math.inf, dtype=_accumulate(q.dtype), device=q.device)
    for b in range(len(cu_seqlens_q) - 1 if cu_seqlens_q is not None else q.shape[0]):
        rows = _rows(b, q.shape[0 if packed else 2], cu_seqlens_q, seqused_q, max_seqlen_q)
        keys = _rows(b, k.shape[0 if packed else 2], cu_seqlens_k, seqused_k, max_seqlen_k)
        q_b, k_b, v_b = (
            t[x].transpose(0, 1)[None] if packed else t[b : b + 1, :, x]
            for t, x in ((q, rows), (k, keys), (v, keys))
        )
        slopes_b = alibi_slopes
        if alibi_slopes is not None and alibi_slopes.dim() == 2:
            slopes_b = alibi_slopes[b : b + 1]
        bias_b, mask_b = (_crop(x, b, q_b.shape[2], k_b.shape[2]) for x in (bias, mask))
        out_b, lse_b = _dense(q_b, k_b, v_b, bias_b, mask_b, slopes_b, batch_offset=b, **options)
        if packed:
            out[rows], lse[:, rows] = out_b[0].transpose(0, 1), lse_b[0]
        else:
            out[b, :, rows], lse[b, :, rows] = out_b[0], lse_b[0]
    return out, lse


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    rng_state: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    average: bool = True,
    **score_options: Any,
) -> Tensor:
    """W = exp(s - lse), after dropout: (B, Hq, Lq, Lk), or its mean over the heads (B, Lq, Lk)."""
    s, keep = _scores(q, k, bias, mask, alibi_slopes, **score_options)
    finite_lse = torch.where(lse.isinf(), 0, lse)[..., None]
    visible = keep & ~lse.isinf()[..., None]
    weights = torch.where(visible, torch.exp(torch.where(visible, s - finite_lse, 0)), 0)
    weights = _dropped(weights, rng_state, dropout_p, 0)
    return (weights.mean(1) if average else weights).to(q.dtype)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    rng_state: Tensor | None,
    dropout_p: float,
    batch_offset: int = 0,
    **score_options: Any,
) -> tuple[Tensor, Tensor]:
    s, keep = _scores(q, k, bias, mask, alibi_slopes, **score_options)
    if sink is not None:  # step 5: one more key, without a value
        s = torch.cat([s, sink.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)], -1)

    lse = _log_sum_exp(s.to(_accumulate(q.dtype)))
    sees_nothing = (s == -math.inf).all(-1, keepdim=True)
    p = torch.softmax(torch.where(sees_nothing, 0, s), -1)[..., : k.shape[2]]  # step 6
    p = _dropped(torch.where(keep, p, 0), rng_state, dropout_p, batch_offset)  # step 7
    return _weighted_sum(p, _per_query_head(v, q), keep), lse  # step 8


def _scores(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    *,
    bottom_right: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    prefix: int = 0,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Steps 1 to 4: the scores s, -inf where masked, and which pairs are kept, (B, Hq, Lq, Lk)."""
    size_q, size_k = q.shape[2], k.shape[2]
    diagonal = size_k - size_q if bottom_right else 0
    i = torch.arange(size_q, device=q.device)[:, None]
    j = torch.arange(size_k, device=q.device)
    keep = torch.ones(*q.shape[:3], size_k, dtype=torch.bool, device=q.device)
    if window_right is not None:
        keep = keep & ((j <= i + diagonal + window_right) | (j < prefix))
    if window_left is not None:
        keep = keep & (j >= i + diagonal - window_left)
    if mask is not None:
        keep = keep & mask
    if bias is not None:
        keep = keep & (bias != -math.inf)

    s = _kept_products(q, _per_query_head(k, q), keep) * scale  # 1
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)  # 2
    if bias is not None:
        s = (s + bias).to(s.dtype)  # 3
    if alibi_slopes is not None:
        distance = (i + diagonal - j).abs().to(_accumulate(s.dtype))
        s = (s - alibi_slopes.to(distance.dtype)[..., None, None] * distance).to(s.dtype)
    return torch.where(keep, s, -math.inf), keep  # 4


def _log_sum_exp(s: Tensor) -> Tensor:
    largest = s.detach().amax(-1) if s.shape[-1] else s.new_full(s.shape[:-1], -math.inf)
    largest = torch.where(largest == -math.inf, 0, largest)
    total = torch.exp(s - largest[..., None]).sum(-1)
    nothing = total == 0
    return torch.where(nothing, -math.inf, largest + torch.log(torch.where(nothing, 1, total)))


def _dropped(p: Tensor, rng_state: Tensor | None, dropout_p: float, batch_offset: int) -> Tensor:
    if dropout_p == 0:
        return p
    assert rng_state is not None, "dropout_p > 0 needs rng_state"
    keep = dropout_keep(rng_state, p.shape, dropout_p, batch_offset)
    return torch.where(keep, p * (1 / (1 - dropout_p) if dropout_p < 1 else 0), 0)


def dropout_keep(
    rng_state: Tensor, shape: tuple[int, ...], dropout_p: float, batch_offset: int = 0
) -> Tensor:
    """Which pairs dropout keeps: bool `shape` = (B, H, Lq, Lk), a function of (b, h, i, j) alone.

    Philox4x32-7, keyed by the seed. One call serves the pairs {i, i+8} x {j, j+8, j+16, j+24} of a
    16 x 32 block by its eight 16-bit halves; kept where the half is below round((1-p) 65536).
    """
    batch, heads, size_q, size_k = shape
    blocks_q, blocks_k = -(-size_q // 16), -(-size_k // 32)
    low32 = 0xFFFFFFFF
    seed, offset = (int(x) for x in rng_state.tolist())
    key = seed ^ 0x666C6173685F6174
    key0, key1 = key & low32, (key >> 32) & low32

    def axis(start: int, count: int, dim: int) -> Tensor:
        shape = [count if d == dim else 1 for d in range(3)]
        return torch.arange(start, start + count, device=rng_state.device).reshape(shape)

    stream = axis(batch_offset * heads, batch * heads, 0) + offset
    x0, x1 = stream & low32, (stream >> 32) & low32
    x2, x3 = axis(0, blocks_k * 8, 2), axis(0, blocks_q * 8, 1)
    for _ in range(7):
        product0, product1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57  # modulo 2^64, so the bits are right
        x0, x1, x2, x3 = (
            (product1 >> 32 & low32) ^ x1 ^ key0,
            product1 & low32,
            (product0 >> 32 & low32) ^ x3 ^ key1,
            product0 & low32,
        )
        key0, key1 = key0 + 0x9E3779B9 & low32, key1 + 0xBB67AE85 & low32
    halves = torch.stack([half for x in (x0, x1, x2, x3) for half in (x & 0xFFFF, x >> 16)], -1)
    # (b, h, q block, q mod 8, k block, k mod 8, q half, k quarter) -> (b, h, q, k)
    halves = halves.reshape(batch, heads, blocks_q, 8, blocks_k, 8, 2, 4)
    halves = halves.permute(0, 1, 2, 6, 3, 4, 7, 5)
    halves = halves.reshape(batch, heads, blocks_q * 16, blocks_k * 32)[:, :, :size_q, :size_k]
    return halves < math.floor((1 - dropout_p) * 65536 + 0.5)


# The two products of attention, over kept pairs only: what is masked is left out of the sums, not
# multiplied by zero, so that 0 * NaN cannot arise in them or in their derivatives, which are the
# same two products again.


class _KeptProducts(torch.autograd.Function):
    """s_ij = q_i . k_j where kept, else 0."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, keep)
        return torch.where(keep, q @ k.mT, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, keep = ctx.saved_tensors
        (ds,) = grads
        return _weighted_sum(ds, k, keep), _weighted_sum(ds.mT, q, keep.mT), None


class _WeightedSum(torch.autograd.Function):
    """o_i = sum of p_ij v_j over the kept j."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(p, v, keep)
        if v.isfinite().all() and p.isfinite().all():
            return torch.where(keep, p, 0) @ v
        kept = keep[..., None]
        terms = torch.where(kept, p[..., None], 0) * torch.where(kept, v[..., None, :, :], 0)
        return terms.sum(-2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        p, v, keep = ctx.saved_tensors
        (do,) = grads
        return _kept_products(do, v, keep), _weighted_sum(p.mT, do, keep.mT), None


_kept_products: Callable[[Tensor, Tensor, Tensor], Tensor] = _KeptProducts.apply
_weighted_sum: Callable[[Tensor, Tensor, Tensor], Tensor] = _WeightedSum.apply


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    """Grouped-query attention: query head h reads key head h // (Hq / Hk)."""
    return x.repeat_interleave(q.shape[1] // max(x.shape[1], 1), 1)


def _rows(
    b: int, size: int, cu_seqlens: Tensor | None, seqused: Tensor | None, max_seqlen: int
) -> slice:
    """Where sequence b lies along its axis of `size`, cut to what the tensor holds."""
    begin, length = 0, size
    if cu_seqlens is not None:
        begin = min(max(int(cu_seqlens[b]), 0), size)
        length = min(max(int(cu_seqlens[b + 1]) - begin, 0), size - begin)
        length = min(length, max_seqlen) if max_seqlen > 0 else length
    if seqused is not None:
        length = min(max(int(seqused[b]), 0), length)
    return slice(begin, begin + length)


def _crop(x: Tensor | None, b: int, size_q: int, size_k: int) -> Tensor | None:
    if x is None:
        return None
    x = x[b : b + 1] if x.shape[0] > 1 else x
    x = x[:, :, :size_q] if x.shape[2] > 1 else x
    return x[..., :size_k] if x.shape[3] > 1 else x


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    """The accumulation type: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
