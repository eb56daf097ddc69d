# SPDX-License-Identifier: BSD-3-Clause
"""Sequences of different lengths in one packed call, without padding.

Padding to the longest sequence computes, and stores, what nobody needs. A packed batch lays the
sequences end to end, (total, heads, head_dim), and says with `cu_seqlens` where each begins.

    python examples/varlen.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import flash_attn


def pad(packed: Tensor, lengths: list[int]) -> Tensor:
    """(total, H, d) -> (B, H, longest, d), zeros behind each sequence."""
    sequences = list(packed.split(lengths))
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).transpose(1, 2)


def unpad(padded: Tensor, lengths: list[int]) -> Tensor:
    """(B, H, longest, d) -> (total, H, d)."""
    rows = padded.transpose(1, 2)
    return torch.cat([rows[b, :n] for b, n in enumerate(lengths)])


def seconds_of(run: Callable[[], Tensor], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--longest", type=int, default=1536)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(argv)

    torch.manual_seed(0)
    heads, head_dim = 8, 64
    lengths = torch.randint(1, arguments.longest + 1, (arguments.sequences,)).tolist()
    lengths[0] = arguments.longest
    total = sum(lengths)
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
    q, k, v = (torch.randn(total, heads, head_dim) for _ in range(3))
    print(f"lengths {lengths}: {total} tokens, padded {len(lengths) * max(lengths)}")

    def packed() -> Tensor:
        return flash_attn.flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, max(lengths), max(lengths), causal=True
        )

    q_padded, k_padded, v_padded = (pad(t, lengths) for t in (q, k, v))

    def padded() -> Tensor:
        return F.scaled_dot_product_attention(q_padded, k_padded, v_padded, is_causal=True)

    # Causal rows never look behind themselves, so the padding needs no mask here.
    gap = (packed() - unpad(padded(), lengths)).abs().max().item()
    print(f"largest difference between packed and padded  {gap:.1e}")

    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    out = flash_attn.flash_attn_varlen_func(
        *inputs, cu_seqlens, cu_seqlens, max(lengths), max(lengths), causal=True
    )
    out.square().sum().backward()
    print(f"gradients for {', '.join(str(tuple(t.grad.shape)) for t in inputs)}")
    print(f"padded, torch SDPA   {1e3 * seconds_of(padded, arguments.repeats):.1f} ms")
    print(f"packed, flash_attn   {1e3 * seconds_of(packed, arguments.repeats):.1f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
