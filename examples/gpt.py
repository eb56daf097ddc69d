# SPDX-License-Identifier: BSD-3-Clause
"""A small character-level GPT whose attention is a function that can be exchanged."""

from __future__ import annotations

import contextlib
import math
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[Tensor], Tensor]  # q, k, v in one (B, N, 3, H, d) -> (B, N, H, d), causal


def heads_first(qkv: Tensor) -> list[Tensor]:
    """q, k and v, each (B, H, N, d), as views."""
    return [part.transpose(1, 2) for part in qkv.unbind(2)]


def softmax_formula(qkv: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, word for word: three (B, H, N, N) tensors come and go."""
    q, k, v = heads_first(qkv)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    weights = torch.softmax(scores.masked_fill(~keep, -math.inf), dim=-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def torch_sdpa(qkv: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*heads_first(qkv), is_causal=True).transpose(1, 2)


def ours(qkv: Tensor) -> Tensor:
    """As torch_sdpa, but the gradient of qkv is one tensor and need not be gathered from three."""
    from flash_attn import flash_attn_qkvpacked_func

    return flash_attn_qkvpacked_func(qkv, causal=True)


ATTENTION: dict[str, Attend] = {
    "torch.softmax": softmax_formula,
    "torch SDPA": torch_sdpa,
    "flash_attn": ours,
}


@dataclass(frozen=True)
class Config:
    layers: int
    width: int
    heads: int
    context: int
    batch: int
    vocabulary: int = 0


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Config, attend: Attend) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attend = attend
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, -1)
        x = x + self.project(self.attend(qkv).reshape(batch, length, width))
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    def __init__(self, config: Config, attend: Attend) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config, attend) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:  # residual branches start small: their sum keeps its variance
            block.project.weight.data.div_(math.sqrt(2 * config.layers))
            block.mlp[2].weight.data.div_(math.sqrt(2 * config.layers))

    def set_attention(self, attend: Attend) -> None:
        for block in self.blocks:
            block.attend = attend

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N) -> logits (B, N, vocabulary)."""
        positions = torch.arange(tokens.size(1), device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross entropy of the next character; tokens (B, N + 1)."""
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def generate(model: GPT, prompt: Tensor, count: int, seconds: float = 15.0) -> Tensor:
    """Append up to `count` sampled characters to prompt (1, N), for as long as there is time."""
    deadline = time.perf_counter() + seconds
    generator = torch.Generator(prompt.device).manual_seed(7)
    tokens = prompt
    for _ in range(count):
        logits = model(tokens[:, -model.config.context :])[:, -1].float()
        logits = logits / 0.7  # favours what is likely
        choice = torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)
        tokens = torch.cat([tokens, choice], dim=1)
        if time.perf_counter() > deadline:
            break
    return tokens


class Text:
    """The sources of Python's standard library as character numbers."""

    characters = "\n" + "".join(chr(c) for c in range(32, 127))

    def __init__(self, limit: int = 6_000_000) -> None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        parts, size = [], 0
        for path in sorted(folder.glob("*.py")) + sorted(folder.glob("*/*.py")):
            if "site-packages" in path.parts or "dist-packages" in path.parts:
                continue
            with contextlib.suppress(OSError, UnicodeDecodeError):
                parts.append(path.read_text(encoding="utf-8"))
                size += len(parts[-1])
            if size > limit:
                break
        text = "".join(parts)[:limit].replace("\t", "    ")
        if len(text) < 100_000:
            raise SystemExit(f"found too little text in {folder}: {len(text)} characters")
        self.folder, self.files = folder, len(parts)
        table = torch.full((128,), self.characters.index("?"), dtype=torch.uint8)
        for number, character in enumerate(self.characters):
            table[ord(character)] = number
        raw = torch.frombuffer(bytearray(text, "ascii", "replace"), dtype=torch.uint8)
        numbers = table[raw.long()]
        split = int(0.95 * len(numbers))
        self.training, self.validation = numbers[:split], numbers[split:]

    def __len__(self) -> int:
        return len(self.training) + len(self.validation)

    def batch(self, config: Config, number: int, *, validation: bool = False) -> Tensor:
        """Batch `number` (B, N + 1): the same for every model, whatever was drawn before."""
        source = self.validation if validation else self.training
        generator = torch.Generator().manual_seed(1_000_003 * number + validation)
        starts = torch.randint(
            len(source) - config.context - 1, (config.batch,), generator=generator
        )
        return torch.stack([source[s : s + config.context + 1] for s in starts.tolist()]).long()

    def decode(self, tokens: Tensor) -> str:
        return "".join(self.characters[t] for t in tokens.tolist())
