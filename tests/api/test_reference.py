# SPDX-License-Identifier: BSD-3-Clause
"""The reference against formulas that are not its own: loops over numbers, torch's MATH backend,
numeric derivatives, published random numbers."""

import math

import pytest
import torch
from cases import BY_NAME
from inputs import make_inputs
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn import reference

SEEN = ["square", "gqa", "causal_top_left_tall", "causal_bottom_right_tall", "window",
        "window_bottom_right", "prefix_window", "softcap", "slopes_per_batch_causal",
        "sink_empty_rows", "bias_heads", "bias_minus_inf", "mask_empty_rows", "scale_negative",
        "dropout_causal_gqa"]  # fmt: skip


def small(name, **changes):
    import dataclasses

    case = dataclasses.replace(BY_NAME[name], head_dim=4, head_dim_v=3, batch=2, **changes)
    return make_inputs(case, "float64")


def by_numbers(inputs):
    """out and lse, one pair of numbers at a time, from the text of the documentation."""
    t, o = inputs.tensors, inputs.options
    q, k, v = (t[name].tolist() for name in "qkv")
    batch, heads, size_q = t["q"].shape[:3]
    heads_k, size_k, dim_v = t["k"].shape[1], t["k"].shape[2], t["v"].shape[3]
    diagonal = size_k - size_q if o.get("bottom_right") else 0
    left, right = o.get("window_left"), o.get("window_right")
    out = torch.zeros(batch, heads, size_q, dim_v, dtype=torch.float64)
    lse = torch.full((batch, heads, size_q), -math.inf, dtype=torch.float64)

    def pair(x, b, h, i, j):
        return x[*(0 if size == 1 else at for size, at in zip(x.shape, (b, h, i, j), strict=True))]

    def score(b, h, i, j):
        s = o["scale"] * sum(x * y for x, y in zip(q[b][h][i], k[b][h * heads_k // heads][j],
                                                   strict=True))  # fmt: skip
        if o.get("softcap"):
            s = o["softcap"] * math.tanh(s / o["softcap"])
        if "bias" in t:
            s += pair(t["bias"], b, h, i, j).item()
        if "alibi_slopes" in t:
            slopes = t["alibi_slopes"]
            s -= (slopes[b, h] if slopes.dim() == 2 else slopes[h]).item() * abs(i + diagonal - j)
        kept = right is None or j <= i + diagonal + right or j < o.get("prefix", 0)
        kept = kept and (left is None or j >= i + diagonal - left)
        kept = kept and ("mask" not in t or pair(t["mask"], b, h, i, j).item())
        return s if kept else -math.inf

    keep = None
    if o.get("dropout_p"):
        keep = reference.dropout_keep(
            t["rng_state"], (batch, heads, size_q, size_k), o["dropout_p"]
        )
    for b in range(batch):
        for h in range(heads):
            for i in range(size_q):
                scores = [score(b, h, i, j) for j in range(size_k)]
                total = sum(math.exp(s) for s in scores)
                if "sink" in t:
                    total += math.exp(t["sink"][h].item())
                if total == 0:
                    continue
                lse[b, h, i] = math.log(total)
                for j, s in enumerate(scores):
                    p = math.exp(s) / total
                    if keep is not None:
                        p *= keep[b, h, i, j].item() / (1 - o["dropout_p"])
                    values = v[b][h * heads_k // heads][j]
                    out[b, h, i] += p * torch.tensor(values, dtype=torch.float64)
    return out, lse


@pytest.mark.parametrize("name", SEEN)
def test_by_numbers(name):
    inputs = small(name, seqlen_q=11, seqlen_k=9 if "tall" in name or "empty" in name else 13)
    out, lse = inputs.call(reference.attention)
    expected_out, expected_lse = by_numbers(inputs)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", [None, "causal", "bool", "float"])
@pytest.mark.parametrize("heads_k", [4, 2])
def test_torch_math(mask, heads_k):
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    q, k, v = make(2, 4, 17, 8), make(2, heads_k, 23, 8), make(2, heads_k, 23, 5)
    options, ours = {}, {}
    if mask == "causal":
        options, ours = {"is_causal": True}, {"window_right": 0}
    elif mask == "bool":
        options["attn_mask"] = ours["mask"] = torch.rand(2, 1, 17, 23) < 0.5
    elif mask == "float":
        options["attn_mask"] = ours["bias"] = make(1, 4, 17, 23)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, **options, enable_gqa=True
        )
    out, _ = reference.attention(q, k, v, scale=8**-0.5, **ours)
    torch.testing.assert_close(out, expected)
    leaves = [
        q,
        k,
        v,
        *(t for t in ours.values() if isinstance(t, torch.Tensor) and t.requires_grad),
    ]
    grad = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, leaves, grad),
                    torch.autograd.grad(expected, leaves, grad), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["square", "gqa_bias_sink_slopes", "sink_empty_rows", "softcap",
                                  "bias_minus_inf", "dropout_causal_gqa"])  # fmt: skip
def test_derivatives(name):
    inputs = small(name, seqlen_q=5, seqlen_k=4)
    names = inputs.differentiable()
    tensors = inputs.tensors

    def function(*leaves):
        out, lse = reference.attention(
            **(tensors | dict(zip(names, leaves, strict=True))), **inputs.options
        )
        return out, torch.where(lse.isinf(), 0, lse)

    leaves = tuple(tensors[n].detach().clone().requires_grad_() for n in names)
    finite = [leaf for leaf in leaves if leaf.isfinite().all()]
    if len(finite) == len(leaves):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves, atol=1e-4)
    else:
        assert torch.autograd.gradcheck(lambda *f: function(*f, *leaves[len(finite) :]), finite)


@pytest.mark.parametrize("name", ["packed", "packed_causal", "packed_seqused", "packed_features"])
def test_packed_is_one_sequence_at_a_time(name):
    inputs = make_inputs(BY_NAME[name], "float64")
    out, lse = inputs.call(reference.attention)
    t, o = inputs.tensors, dict(inputs.options)
    for key in ("max_seqlen_q", "max_seqlen_k"):
        o.pop(key)
    owned = torch.zeros(out.shape[0], dtype=torch.bool)
    for b in range(len(t["cu_seqlens_q"]) - 1):
        rows, keys = (
            slice(int(t[f"cu_seqlens_{x}"][b]), int(t[f"cu_seqlens_{x}"][b + 1])) for x in "qk"
        )
        if "seqused_q" in t:
            rows = slice(rows.start, rows.start + int(t["seqused_q"][b]))
            keys = slice(keys.start, keys.start + int(t["seqused_k"][b]))
        if rows.start == rows.stop:
            continue
        more = {n: t[n] for n in ("sink", "rng_state") if n in t}
        if "alibi_slopes" in t:
            more["alibi_slopes"] = t["alibi_slopes"][b]
        one = [t[n][s].transpose(0, 1)[None].expand(b + 1, -1, -1, -1)
               for n, s in (("q", rows), ("k", keys), ("v", keys))]  # fmt: skip
        out_b, lse_b = reference.attention(*one, **more, **o)
        torch.testing.assert_close(out[rows], out_b[b].transpose(0, 1))
        torch.testing.assert_close(lse[:, rows], lse_b[b])
        owned[rows] = True
    assert (out[~owned] == 0).all() and (lse[:, ~owned] == -math.inf).all()


def philox_by_numbers(counter, key, rounds=7):
    """Salmon et al. (2011), on Python's integers."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(rounds):
        a, b = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (b >> 32) ^ x1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ x3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return x0, x1, x2, x3


def test_published_random_numbers():
    ones = 0xFFFFFFFF
    zeros = philox_by_numbers((0, 0, 0, 0), (0, 0), 10)
    assert zeros == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    full = philox_by_numbers((ones,) * 4, (ones,) * 2, 10)
    assert full == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


@pytest.mark.parametrize("state", [(0, 0), (-1, 4), (0x123456789ABCDEF, (1 << 33) + 5)])
def test_dropout_by_numbers(state):
    batch, heads, size_q, size_k, p = 2, 3, 37, 70, 0.37
    keep = reference.dropout_keep(torch.tensor(state), (batch, heads, size_q, size_k), p)
    seed = (state[0] & (2**64 - 1)) ^ 0x666C6173685F6174
    key, threshold = (seed & 0xFFFFFFFF, seed >> 32), round((1 - p) * 65536)
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 36, 69), (0, 1, 8, 0), (1, 0, 15, 31), (0, 2, 16, 32),
                       (1, 1, 7, 24), (0, 0, 25, 41)]:  # fmt: skip
        low = state[1] + b * heads + h
        counter = (low & 0xFFFFFFFF, low >> 32, j // 32 * 8 + j % 8, i // 16 * 8 + i % 8)
        half = 4 * (i % 16 // 8) + j % 32 // 8
        word = philox_by_numbers(counter, key)[half // 2]
        assert keep[b, h, i, j].item() == ((word >> 16 * (half % 2) & 0xFFFF) < threshold)
    offset = reference.dropout_keep(torch.tensor(state), (1, heads, size_q, size_k), p, 1)
    assert torch.equal(offset[0], keep[1])


def test_weights():
    inputs = small("gqa_bias_sink_slopes", seqlen_q=9, seqlen_k=12)
    tensors = {n: t for n, t in inputs.tensors.items() if n not in ("v", "sink")}
    eye = torch.eye(12, dtype=torch.float64).expand(2, 2, 12, 12)
    out, lse = reference.attention(**(inputs.tensors | {"v": eye}), **inputs.options)
    weights = reference.attention_weights(lse=lse, average=False, **tensors, **inputs.options)
    torch.testing.assert_close(weights, out)
    mean = reference.attention_weights(lse=lse, **tensors, **inputs.options)
    torch.testing.assert_close(mean, out.mean(1))


def test_masked_nan_is_absent():
    q, k, v = (torch.randn(1, 1, 4, 3, dtype=torch.float64) for _ in range(3))
    keep = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    keep[:, :, :2, 2] = False
    clean, _ = reference.attention(q, k, v, mask=keep)
    k[:, :, 2], v[:, :, 2] = math.nan, math.inf
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, _ = reference.attention(*leaves, mask=keep)
    assert torch.equal(out[:, :, :2], clean[:, :, :2]) and out[:, :, 2:].isnan().all()
    dq, _, _ = torch.autograd.grad(out[:, :, :2].sum(), leaves)
    assert dq[:, :, :2].isfinite().all()
