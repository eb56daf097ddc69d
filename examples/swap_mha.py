# SPDX-License-Identifier: BSD-3-Clause
"""Swap the attention of a model that was written with torch.nn, and swap it back.

A torch.nn.TransformerEncoder with padded sequences computes the same with flash_attn in place of
torch.nn.MultiheadAttention: same parameters, same state dict, same outputs and gradients.

    python examples/swap_mha.py
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

import flash_attn.nn


def make_model(width: int, heads: int, layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        width, heads, dim_feedforward=2 * width, dropout=0.0, batch_first=True
    )
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def step(model: nn.Module, x: Tensor, padding: Tensor) -> tuple[Tensor, list[Tensor], float]:
    """Output, gradients and seconds of one forward and backward."""
    model.zero_grad(set_to_none=True)
    begin = time.perf_counter()
    out = model(x, src_key_padding_mask=padding)
    kept = out.masked_fill(padding[..., None], 0.0)  # outputs at padding mean nothing
    kept.square().mean().backward()
    seconds = time.perf_counter() - begin
    return kept.detach(), [p.grad.clone() for p in model.parameters()], seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(argv)

    torch.manual_seed(0)
    heads = max(1, arguments.width // 64)
    model = make_model(arguments.width, heads, layers=2).train()
    lengths = torch.tensor([arguments.length, arguments.length * 2 // 3])
    x = torch.randn(len(lengths), arguments.length, arguments.width)
    padding = torch.arange(arguments.length) >= lengths[:, None]  # True: not there

    names = [name for name, _ in model.named_parameters()]
    kept, gradients, _ = step(model, x, padding)
    before = [step(model, x, padding)[2] for _ in range(arguments.repeats)]

    flash_attn.nn.replace_mha(model)
    swapped = [m for m in model.modules() if isinstance(m, flash_attn.nn.MultiheadAttention)]
    print(f"replaced {len(swapped)} modules by {type(swapped[0]).__qualname__}")
    assert [name for name, _ in model.named_parameters()] == names
    kept_ours, gradients_ours, _ = step(model, x, padding)
    after = [step(model, x, padding)[2] for _ in range(arguments.repeats)]

    flash_attn.nn.restore_mha(model)
    assert not any(isinstance(m, flash_attn.nn.MultiheadAttention) for m in model.modules())

    out_gap = (kept - kept_ours).abs().max().item()
    pairs = list(zip(gradients, gradients_ours, strict=True))
    scale = max(a.abs().max().item() for a, _ in pairs)
    grad_gap = max((a - b).abs().max().item() for a, b in pairs)
    print(f"largest difference of outputs    {out_gap:.1e} (of {kept.abs().max():.1f})")
    print(f"largest difference of gradients  {grad_gap:.1e} (of {scale:.1e})")
    print(f"forward and backward, torch.nn   {1e3 * statistics.median(before):.1f} ms")
    print(f"forward and backward, flash_attn {1e3 * statistics.median(after):.1f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
