# SPDX-License-Identifier: BSD-3-Clause
"""Training steps of a whole GPT by attention: `python -m benchmarks.train --output results.json`.

Forward, backward and AdamW in bf16 autocast, 16k tokens a step, on real text. Standard attention
(torch.softmax), torch's default scaled_dot_product_attention and ours (flash_attn_qkvpacked_func:
the gradient of the projection is one tensor) start from the same weights and read the same batches.
They take turns of sixteen steps, in a new random order each round. The last eight of a turn are
timed, together, at a clock that follows their own power more than that of the turn before. The
learning rate rises over the first ten steps; without that, steps of Adam that are as large for
noise as for a gradient part the losses of equally exact gradients. Tokens per second are medians
over the turns after the first; memory is the peak of a turn beyond what was allocated before it;
"does not fit" is an out-of-memory error.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import machine

sys.path.insert(0, str(machine.ROOT / "examples"))
from gpt import ATTENTION, GPT, Config, Text

TOKENS = 16384
CONTEXTS = (1024, 4096, 16384)
MODELS = {
    "GPT-2 small": {"layers": 12, "width": 768, "heads": 12},
    "1.3B, 4 layers": {"layers": 4, "width": 2048, "heads": 16},
}
TURN, SETTLING = 16, 8  # steps
LEARNING_RATE, RISING_STEPS = 3e-4, 10


@dataclass
class Contender:
    name: str
    model: GPT
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def step(self, tokens: torch.Tensor, number: int) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (number + 1) / RISING_STEPS)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = self.model.loss(tokens)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def turn(self, batches: list[torch.Tensor]) -> None:
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        done, losses = len(self.losses), []
        for i, tokens in enumerate(batches):
            if i == SETTLING:
                torch.cuda.synchronize()
                begin = time.perf_counter()
            losses.append(self.step(tokens, done + i))
        torch.cuda.synchronize()
        self.seconds.append((time.perf_counter() - begin) / (TURN - SETTLING))
        self.losses += torch.stack(losses).tolist()
        self.optimizer.zero_grad(set_to_none=True)
        self.peak_bytes = torch.cuda.max_memory_allocated() - held

    def summary(self, tokens: int) -> dict[str, Any]:
        timed = self.seconds[1:]
        return {
            "tokens_per_s": tokens / statistics.median(timed),
            "spread": max(timed) / min(timed),
            "peak_bytes": self.peak_bytes,
            "losses": self.losses,
        }


def contenders(config: Config, seed: int) -> list[Contender]:
    torch.manual_seed(seed)
    first = GPT(config, ATTENTION["torch.softmax"]).cuda()
    made = []
    for name, attend in ATTENTION.items():
        model = copy.deepcopy(first)
        model.set_attention(attend)
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
        made.append(Contender(name, model, optimizer))
    return made


def measure(config: Config, text: Text, turns: int, seed: int) -> dict[str, dict[str, Any]]:
    """{attention: figures, or {"refused": why}}"""
    running = contenders(config, seed)
    results: dict[str, dict[str, Any]] = {}
    order = random.Random(seed)
    for number in range(turns):
        batches = [text.batch(config, number * TURN + i).cuda() for i in range(TURN)]
        order.shuffle(running)
        for contender in list(running):
            try:
                contender.turn(batches)
            except torch.OutOfMemoryError:
                running.remove(contender)
                contender.optimizer.zero_grad(set_to_none=True)
                results[contender.name] = {"refused": "does not fit"}
                torch.cuda.empty_cache()
    results |= {c.name: c.summary(TOKENS) for c in running}
    return {name: results[name] for name in ATTENTION}


def training_table(report: dict[str, Any]) -> str:
    """Tokens per second and memory of a step, by model and context."""
    from .report import markdown_table

    lines = []
    for row in report["rows"]:
        cells = [f"{row['model']}, {row['context']:,}"]
        for result in row["attention"].values():
            if "refused" in result:
                cells.append(result["refused"])
            else:
                memory = f"{result['peak_bytes'] / 2**30:.1f} GiB"
                cells.append(f"{result['tokens_per_s']:,.0f}; {memory}")
        lines.append(cells + [_gain(row, name) for name in ("torch SDPA", "torch.softmax")])
    header = ["model, context", *ATTENTION, "gain over torch SDPA", "over torch.softmax"]
    return markdown_table(header, lines)


def _gain(row: dict[str, Any], other: str) -> str:
    rates = [row["attention"][name].get("tokens_per_s") for name in ("flash_attn", other)]
    return f"{rates[0] / rates[1]:.2f}" if all(rates) else "-"


def draw(report: dict[str, Any], path: Path) -> Path:
    """Loss by step, one panel a model and context, one line an attention."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from .plots import STYLE

    colors = {"torch.softmax": "#c2512f", "torch SDPA": "#8a8f98", "flash_attn": "#1f6fb2"}
    rows = report["rows"]
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            -(-len(rows) // 3), 3, figsize=(9.6, 5.4), squeeze=False, layout="constrained"
        )
        for axes, row in zip(grid.flat, rows, strict=False):
            axes.set_title(f"{row['model']}, {row['context']:,}")
            for name, result in row["attention"].items():
                if "losses" in result:
                    style = "--" if name == "flash_attn" else "-"
                    axes.plot(result["losses"], style, color=colors[name], label=name)
        grid.flat[0].legend()
        figure.supxlabel("step")
        figure.supylabel("loss")
        figure.suptitle(f"Training loss: {report['machine']['device']}", fontsize=12)
        figure.savefig(path)
        plt.close(figure)
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    parser.add_argument("--turns", type=int, default=4, help=f"of {TURN} steps (4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--contexts", type=int, nargs="*", default=CONTEXTS)
    parser.add_argument("--output", type=Path, metavar="JSON")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.train needs a CUDA GPU; examples/train_gpt.py runs on a CPU")
    if arguments.turns < 2:
        raise SystemExit("--turns must be more than 1, which warms up")
    text = Text()
    rows = []
    for name in arguments.models:
        for context in arguments.contexts:
            config = Config(
                **MODELS[name],
                context=context,
                batch=max(1, TOKENS // context),
                vocabulary=len(text.characters),
            )
            result = measure(config, text, arguments.turns, arguments.seed)
            rows.append({"model": name, "context": context, "attention": result})
            torch.cuda.empty_cache()
    report = {
        "schema": "train-1",
        "machine": machine.describe(torch.device("cuda")) | {"flash_attn": machine.build()},
        "tokens": TOKENS,
        "steps": arguments.turns * TURN,
        "rows": rows,
    }
    print(training_table(report))
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
        print(draw(report, arguments.output.with_suffix(".png")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
