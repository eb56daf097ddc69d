# SPDX-License-Identifier: BSD-3-Clause
"""Train one GPT three times: attention as torch.softmax, as torch's SDPA, as flash_attn.

All three start from the same weights and read the same batches; their steps take turns, so that
none has a quieter machine than the others. Then parity, tokens per second and peak memory.

    python examples/train_gpt.py            # a GPU if there is one, else the CPU
    python examples/train_gpt.py --help
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpt import ATTENTION, GPT, Config, Text, generate
from progress import Progress, print_table
from scaling import measure_scaling
from torch import Tensor

CPU_CONFIG = Config(layers=4, width=128, heads=2, context=1024, batch=2)
GPU_CONFIG = Config(layers=6, width=512, heads=8, context=2048, batch=2)


@dataclass
class Run:
    """One of the three trainings."""

    name: str
    model: GPT
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    validation: float = float("nan")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="for training (CPU 4.5, GPU 1.5)")
    parser.add_argument("--steps", type=int, help="exactly this many instead")
    parser.add_argument("--context", type=int, help="characters a sequence")
    parser.add_argument("--batch", type=int, help="sequences a step")
    parser.add_argument("--width", type=int, help="width of the model, heads of 64")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lengths", type=int, nargs="*", help="sequence lengths to measure at")
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    return parser.parse_args(argv)


def precision(device: torch.device) -> Any:
    """bf16 autocast on a GPU that has it; fp32 elsewhere."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_runs(config: Config, device: torch.device, seed: int) -> list[Run]:
    torch.manual_seed(seed)
    first = GPT(config, ATTENTION["torch.softmax"]).to(device)
    runs = []
    for name, attend in ATTENTION.items():
        model = copy.deepcopy(first)
        model.set_attention(attend)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1
        )
        runs.append(Run(name, model, optimizer))
    return runs


def gradients(run: Run, tokens: Tensor, device: torch.device) -> float:
    """Forward and backward; returns the loss."""
    run.optimizer.zero_grad(set_to_none=True)
    with precision(device):
        loss = run.model.loss(tokens)
    loss.backward()
    return loss.item()


def choose_steps(
    runs: list[Run], text: Text, device: torch.device, minutes: float, most: int = 1000
) -> int:
    """As many steps as fit, measured without changing a weight."""
    spent = 0.0
    for run in runs:
        for attempt in range(3):
            tokens = text.batch(run.model.config, attempt).to(device)
            synchronize(device)
            begin = time.perf_counter()
            gradients(run, tokens, device)
            synchronize(device)
            if attempt > 0:  # the first one warms up
                spent += (time.perf_counter() - begin) / 2
    return max(20, min(most, int(minutes * 60 / (1.05 * spent))))


def learning_rate(step: int, steps: int, peak: float = 2e-3) -> float:
    """Linear warm-up over the first tenth, then linear decay to a tenth."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1.0 - 0.9 * (step - warmup) / max(1, steps - warmup))


def train(runs: list[Run], text: Text, steps: int, device: torch.device, minutes: float) -> None:
    """Stops early if the machine has become much slower than `choose_steps` found it."""
    config = runs[0].model.config
    deadline = time.perf_counter() + 1.25 * 60 * minutes
    with Progress("training", steps) as progress:
        for step in range(steps):
            tokens = text.batch(config, step).to(device)
            turn = step % len(runs)
            for run in runs[turn:] + runs[:turn]:
                for group in run.optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps)
                synchronize(device)
                begin = time.perf_counter()
                loss = gradients(run, tokens, device)
                torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
                run.optimizer.step()
                synchronize(device)
                run.seconds.append(time.perf_counter() - begin)
                run.losses.append(loss)
            progress.advance("  ".join(f"{r.name} {r.losses[-1]:.4f}" for r in runs))
            if time.perf_counter() > deadline:
                break
    for run in runs:
        with torch.no_grad(), precision(device):
            held_out = [text.batch(config, i, validation=True).to(device) for i in range(8)]
            run.validation = statistics.fmean(run.model.loss(t).item() for t in held_out)


def report_training(runs: list[Run]) -> list[dict[str, Any]]:
    config = runs[0].model.config
    tokens = config.batch * config.context
    base = runs[0]
    rows = []
    for run in runs:
        gap = max(abs(a - b) for a, b in zip(run.losses, base.losses, strict=True))
        rows.append(
            {
                "attention": run.name,
                "first loss": f"{run.losses[0]:.4f}",
                "last loss": f"{statistics.fmean(run.losses[-10:]):.4f}",
                "held-out loss": f"{run.validation:.4f}",
                "largest loss gap": "-" if run is base else f"{gap:.1e}",
                "tokens/s": f"{tokens / statistics.median(run.seconds):,.0f}",
                "step": f"{1e3 * statistics.median(run.seconds):.1f} ms",
            }
        )
    print_table("Training: same weights at the start, same batches", rows)
    return rows


def report_parity(run: Run, text: Text, device: torch.device) -> list[dict[str, Any]]:
    """Largest errors against the formula in fp64, on q, k, v of the trained model's last layer."""
    captured: list[Tensor] = []

    def capture(qkv: Tensor) -> Tensor:
        captured.append(qkv.detach())
        return ATTENTION[run.name](qkv)

    run.model.set_attention(capture)
    with torch.no_grad(), precision(device):
        run.model(text.batch(run.model.config, 0, validation=True)[:1, :-1].to(device))
    run.model.set_attention(ATTENTION[run.name])
    layer = captured[-1]
    shape = layer[:, :, 0].shape
    dout = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(layer)

    def results(name: str, dtype: torch.dtype) -> list[Tensor]:
        qkv = layer.to(dtype).requires_grad_()
        out = ATTENTION[name](qkv)
        (dqkv,) = torch.autograd.grad(out, qkv, dout.to(dtype))
        return [out.detach(), *dqkv.unbind(2)]

    exact = results("torch.softmax", torch.float64)
    rows = []
    for name in ATTENTION:
        found = results(name, layer.dtype)
        errors = [(a.double() - b).abs().max().item() for a, b in zip(found, exact, strict=True)]
        labels = ("out", "dq", "dk", "dv")
        rows.append(
            {"attention": name} | {k: f"{e:.1e}" for k, e in zip(labels, errors, strict=True)}
        )
    sizes = "x".join(str(n) for n in shape)
    dtype_name = str(layer.dtype).removeprefix("torch.")
    print_table(f"Largest error against the fp64 formula, last layer, {dtype_name} {sizes}", rows)
    return rows


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        import flash_attn
    except ImportError as error:
        message = f"flash_attn is not installed here ({error}); `make demo` builds it"
        raise SystemExit(message) from error
    device = torch.device(arguments.device)
    begin = time.perf_counter()
    text = Text()
    config = dataclasses.replace(
        GPU_CONFIG if device.type == "cuda" else CPU_CONFIG, vocabulary=len(text.characters)
    )
    changes = {k: getattr(arguments, k) for k in ("context", "batch", "width", "layers")}
    config = dataclasses.replace(config, **{k: v for k, v in changes.items() if v is not None})
    config = dataclasses.replace(config, heads=max(1, config.width // 64))
    runs = make_runs(config, device, arguments.seed)
    parameters = sum(p.numel() for p in runs[0].model.parameters())
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"text      {len(text):,} characters in {text.files} files of {text.folder}")
    print(f"model     {parameters:,} parameters; {config}")
    print(f"machine   {where}; torch {torch.__version__}")
    print(f"package   flash_attn {getattr(flash_attn, '__version__', '')}")
    minutes = arguments.minutes or (1.5 if device.type == "cuda" else 4.5)
    steps = arguments.steps or choose_steps(runs, text, device, minutes)
    train(runs, text, steps, device, float("inf") if arguments.steps else minutes)
    results: dict[str, Any] = {"machine": where, **dataclasses.asdict(config)}
    results["steps"] = len(runs[0].losses)
    results["training"] = report_training(runs)
    results["parity"] = report_parity(runs[-1], text, device)
    with precision(device):
        prompt = text.batch(config, 3, validation=True)[:1, :64].to(device)
        written = text.decode(generate(runs[-1].model, prompt, 240)[0, 64:].cpu())
    print("\nThe flash_attn model writes Python like this:\n")
    print("\n".join("    | " + line for line in written.splitlines()))
    losses = {run.name: run.losses for run in runs}
    del runs
    results["scaling"] = measure_scaling(config, device, arguments.lengths)
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = arguments.output / "results.json"
    record.write_text(json.dumps(results | {"losses": losses}, indent=1) + "\n")
    try:
        from plots import draw
    except ImportError as error:
        print(f"\nno plots: {error}", file=sys.stderr)
    else:
        print("\nplots")
        for path in draw(losses, results["scaling"], where, arguments.output):
            print(f"    {path.resolve()}")
    print(f"figures\n    {record.resolve()}\ndone in {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
