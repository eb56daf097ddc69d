# SPDX-License-Identifier: BSD-3-Clause
"""Tokens per second and peak memory of a training step, for growing sequence length.

On a CPU every point is a child process, whose high-water mark of resident memory belongs to that
point alone; on a GPU it is the caching allocator's high-water mark.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpt import ATTENTION, GPT, Config
from progress import Progress, print_table

CPU_LENGTHS = (512, 1024, 2048, 4096, 8192)
GPU_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
_CHILD = "--measure-one-point"


def measure_scaling(
    config: Config, device: torch.device, lengths: list[int] | None, minutes: float = 3.0
) -> list[dict[str, Any]]:
    """One row a (length, attention): tokens_per_s and peak_bytes, or `failed` with the reason."""
    deadline = time.perf_counter() + 60 * minutes
    if lengths is None:
        lengths = list(CPU_LENGTHS if device.type == "cpu" else GPU_LENGTHS)
    rows: list[dict[str, Any]] = []
    if not lengths:
        return rows
    print()
    with Progress("growing length", len(lengths) * len(ATTENTION)) as progress:
        for length in lengths:
            for name in ATTENTION:
                point = dataclasses.replace(config, context=length, batch=1)
                row = {"length": length, "attention": name}
                if time.perf_counter() > deadline:
                    row["failed"] = "out of time"
                elif device.type == "cpu":
                    row |= _in_child(point, name)
                else:
                    row |= _on_gpu(point, name)
                rows.append(row)
                progress.advance(f"{length} tokens, {name}: {_shown(row)}")
    _print(rows, lengths)
    return rows


def _shown(row: dict[str, Any]) -> str:
    if "failed" in row:
        return str(row["failed"])
    return f"{row['tokens_per_s']:,.0f} tokens/s, {row['peak_bytes'] / 2**20:,.0f} MiB"


def _print(rows: list[dict[str, Any]], lengths: list[int]) -> None:
    def cells(field: str, scale: float) -> list[dict[str, str]]:
        table = []
        for name in ATTENTION:
            found = {r["length"]: r for r in rows if r["attention"] == name}
            line = {"attention": name}
            for length in lengths:
                value = found[length].get(field)
                line[f"{length}"] = "-" if value is None else f"{value * scale:,.0f}"
            table.append(line)
        return table

    print_table(
        "Tokens per second of a training step, by sequence length", cells("tokens_per_s", 1)
    )
    print_table("Peak memory in MiB, by sequence length", cells("peak_bytes", 2**-20))


def _in_child(config: Config, name: str) -> dict[str, Any]:
    score_bytes = 4 * config.heads * config.context**2
    held = score_bytes * (config.layers + 4)  # the weights of each layer, and a few on the way
    if name == "torch.softmax" and held > 0.6 * _available_bytes():
        return {"failed": f"needs about {held / 2**30:.0f} GiB"}
    request = json.dumps({"config": dataclasses.asdict(config), "attention": name})
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), _CHILD, request],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return {"failed": lines[-1] if lines else f"exit status {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _available_bytes() -> int:
    with contextlib.suppress(OSError):
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
        if found:
            return int(found.group(1)) * 1024
    return 4 << 30


def _steps(config: Config, name: str, device: torch.device, seconds: float) -> float:
    """Median seconds of a training step without the optimizer."""
    model = GPT(config, ATTENTION[name]).to(device)
    tokens = torch.randint(config.vocabulary, (config.batch, config.context + 1), device=device)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 2 or (time.perf_counter() < end and len(times) < 50):
        begin = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = model.loss(tokens)
        loss.backward()
        loss.item()  # waits for a GPU
        model.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - begin)
    timed = sorted(times[1:])
    return timed[len(timed) // 2]


def _on_gpu(config: Config, name: str) -> dict[str, Any]:
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        seconds = _steps(config, name, device, seconds=1.0)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    peak = torch.cuda.max_memory_allocated()
    return {"tokens_per_s": config.batch * config.context / seconds, "peak_bytes": peak}


def _peak_resident_bytes() -> int:
    """High-water mark of this process's resident memory."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if found:  # getrusage would also count what the parent had before exec
            return int(found.group(1)) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _child(request: str) -> None:
    wanted = json.loads(request)
    config = Config(**wanted["config"])
    tiny = dataclasses.replace(config, context=32)
    _steps(tiny, wanted["attention"], torch.device("cpu"), seconds=0.0)
    before = _peak_resident_bytes()
    seconds = _steps(config, wanted["attention"], torch.device("cpu"), seconds=1.5)
    peak = _peak_resident_bytes()
    rate = config.batch * config.context / seconds
    print(json.dumps({"tokens_per_s": rate, "peak_bytes": peak, "idle_bytes": before}))


if __name__ == "__main__" and len(sys.argv) == 3 and sys.argv[1] == _CHILD:
    _child(sys.argv[2])
