# SPDX-License-Identifier: BSD-3-Clause
"""Measure attention: `python -m benchmarks.bench --suite cpu-core --output results.json`.

TFLOP/s count 4 b h sq sk d forward (half if causal) and 2.5 times that backward, for every rival,
whatever it really computes. `--check` compares each rival with the formula in fp64 first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import machine, timing
from .cases import SUITES, Case
from .rivals import TORCH_DTYPES, Rival, default_rivals, eager, make_inputs, make_rival

SCHEMA = 1


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument("--suite", choices=sorted(SUITES), help="default: cuda or cpu-core")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--rivals", nargs="+", metavar="NAME", help="default: all of the device")
    parser.add_argument("--device", help="cpu or cuda; default: as the suite says")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--rounds", type=int, default=15, help="at most this many (15)")
    parser.add_argument("--seconds", type=float, metavar="S", help="time for the whole run")
    parser.add_argument("--warmup", type=float, metavar="S", help="per case (GPU 0.5, CPU 0.05)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="errors against fp64, small cases")
    parser.add_argument("--output", type=Path, metavar="JSON")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    return parser.parse_args(argv)


def choose_cases(arguments: argparse.Namespace) -> list[Case]:
    """The suite's cases, least work first, so that a time limit drops the longest."""
    cases = [c for c in SUITES[arguments.suite]() if re.search(arguments.only, c.name)]
    if not cases:
        raise SystemExit(f"no case of suite {arguments.suite} matches {arguments.only!r}")
    return sorted(cases, key=lambda case: case.flops)


def time_share(cases: list[Case], seconds: float) -> float:
    """What of the seconds left the first case gets: by its work, but not next to nothing."""
    floor = max(case.flops for case in cases) / 20
    weights = [max(case.flops, floor) for case in cases]
    return 0.6 * seconds * weights[0] / sum(weights)  # the rest: calibration and warm-up


def largest_error(case: Case, rival: Rival, device: torch.device) -> float | None:
    """max |out - formula in fp64| of a case without dropout and of moderate size."""
    if case.dropout_p > 0 or case.score_bytes > 2**29:
        return None
    forward = dataclasses.replace(case, direction="forward")
    inputs = make_inputs(forward, device, seed=1)
    exact = dataclasses.replace(inputs)
    for name in ("q", "k", "v", "mask"):
        tensor = getattr(exact, name)
        if tensor is not None and tensor.dtype != torch.bool:
            setattr(exact, name, tensor.double())
    try:
        with rival.context(), torch.no_grad():
            out = rival.run(forward, inputs)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return None
    return (out.double() - eager(forward, exact)).abs().max().item()


def print_row(case: Case, rivals: dict[str, dict[str, Any]], scale: float, unit: str) -> None:
    print(f"{case.name}")
    for name, result in rivals.items():
        if "refused" in result:
            print(f"    {name:16s} refused: {result['refused']}")
            continue
        spread = (result["q3_s"] - result["q1_s"]) / result["median_s"]
        peak = result["peak_bytes"]
        memory = "" if peak is None else f"  peak +{peak / 2**20:8.1f} MiB"
        error = result.get("max_error")
        shown_error = "" if error is None else f"  error {error:.1e}"
        print(
            f"    {name:16s} {result['median_s'] * 1e3:10.3f} ms  IQR {spread:5.1%}"
            f"  {result['tflops'] * scale:8.1f} {unit}{memory}{shown_error}"
        )
    sys.stdout.flush()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device)
    cases = choose_cases(arguments)
    names = arguments.rivals or default_rivals(device)
    rivals = [make_rival(name) for name in names]
    warmup = arguments.warmup
    if warmup is None:
        warmup = 0.5 if device.type == "cuda" else 0.05
    begin = time.perf_counter()
    dtypes = sorted({case.dtype for case in cases})
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "suite": arguments.suite,
        "machine": machine.describe(device)
        | {"flash_attn": machine.build() if any(n.startswith("ours") for n in names) else None},
        "matmul_flops": {
            d: {"before": machine.matmul_rate(device, TORCH_DTYPES[d])} for d in dtypes
        },
        "rows": [],
        "not_run": [],
    }
    scale, unit = (1.0, "TFLOP/s") if device.type == "cuda" else (1e3, "GFLOP/s")
    for position, case in enumerate(cases):
        left = None
        if arguments.seconds is not None:
            left = arguments.seconds - (time.perf_counter() - begin)
            if left <= 0:
                report["not_run"] += [c.name for c in cases[position:]]
                break
        share = 4.0 if left is None else time_share(cases[position:], left) - warmup
        plan = timing.Plan(
            device, seconds=share, rounds=arguments.rounds, warmup_s=warmup, seed=arguments.seed
        )
        results = timing.measure(case, rivals, plan)
        if arguments.check:
            for rival in rivals:
                if "refused" not in results[rival.name]:
                    results[rival.name]["max_error"] = largest_error(case, rival, device)
        row: dict[str, Any] = {"case": case.name, **dataclasses.asdict(case), "rivals": results}
        if device.type == "cuda":
            row["gpu"] = machine.gpu_state()
            torch.cuda.empty_cache()
        report["rows"].append(row)
        print_row(case, results, scale, unit)
        write(report, arguments.output)
    for dtype, rates in report["matmul_flops"].items():
        rates["after"] = machine.matmul_rate(device, TORCH_DTYPES[dtype])
        before, after = (rates[when] * 1e-12 * scale for when in ("before", "after"))
        print(f"matrix product {dtype}: {before:.1f} before, {after:.1f} after, {unit}")
    for name in report["not_run"]:
        print(f"not run, out of time: {name}")
    report["wall_s"] = round(time.perf_counter() - begin, 1)
    return report


def write(report: dict[str, Any], path: Path | None) -> None:
    """After every case: a run that is cut short keeps what it measured."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.suite is None:
        arguments.suite = "cuda" if torch.cuda.is_available() else "cpu-core"
    if arguments.device is None:
        arguments.device = "cuda" if arguments.suite.startswith("cuda") else "cpu"
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this suite needs a GPU, and torch sees none here")
    if arguments.list:
        for case in choose_cases(arguments):
            print(case.name)
        return 0
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    report = run(arguments)
    write(report, arguments.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
