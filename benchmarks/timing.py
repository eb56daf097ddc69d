# SPDX-License-Identifier: BSD-3-Clause
"""How a case is timed: rivals interleaved in one process, in a new random order each round.

A round times every rival once, on inputs that rotate; clocks, caches and temperature are then the
same for all of them on average, and a rival never always runs after the same neighbour. Figures
are medians with quartiles. GPU times are CUDA events around calls that are queued back to back,
behind a kernel of 0.2 ms, under which the first of them are queued: how long the host takes for one
call does not count, unless it is longer than the call itself.
"""

from __future__ import annotations

import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .machine import PeakMemory, available_bytes, synchronize
from .rivals import Inputs, Rival, make_inputs, refusal_reason

# A measurement repeats the call until it is this long, so that clock reads do not count.
_MEASUREMENT_S = {"cpu": 4e-3, "cuda": 2e-3}
_FEWEST_CALLS = {"cpu": 1, "cuda": 4}
_MAX_CALLS = 50
_HEAD_START_CYCLES = 400_000  # of the GPU's clock: 0.2 ms
# A call of this length needs no second one to be warm.
_LONG_CALL_S = 0.3
# Eager softmax attention holds scores, weights and their gradients at once.
_QUADRATIC_TENSORS = {"forward": 3, "backward": 5, "both": 5}


@dataclass
class Plan:
    """Limits of one case."""

    device: torch.device
    seconds: float = 2.0
    rounds: int = 15
    warmup_s: float = 0.5
    min_rounds: int = 3
    seed: int = 0


@dataclass
class _Entry:
    rival: Rival
    calls: int = 1
    call_s: float = 0.0
    peak_bytes: int | None = None
    samples: list[float] = field(default_factory=list)


def measure(case: Case, rivals: list[Rival], plan: Plan) -> dict[str, dict[str, Any]]:
    """{rival: {median_s, q1_s, q3_s, ...} or {refused: reason}} of one case."""
    random_order = random.Random(f"{plan.seed} {case.name}")
    sets = _input_sets(case, plan)
    results: dict[str, dict[str, Any]] = {}
    entries: list[_Entry] = []
    for rival in rivals:
        outcome = _calibrate(case, rival, sets[0], plan.device)
        if isinstance(outcome, str):
            results[rival.name] = {"refused": outcome}
        else:
            entries.append(outcome)
    if entries:
        _warm_up(case, entries, sets, plan)
        _rounds(case, entries, sets, plan, random_order)
    for entry in entries:
        results[entry.rival.name] = _summary(case, entry)
    return {rival.name: results[rival.name] for rival in rivals}


def _input_sets(case: Case, plan: Plan) -> list[Inputs]:
    count = 3 if plan.device.type == "cuda" else 2
    return [make_inputs(case, plan.device, plan.seed + i) for i in range(count)]


def _timed_call(case: Case, rival: Rival, x: Inputs) -> Callable[[], object]:
    """What is timed for this direction; the forward pass of `backward` runs here, untimed."""
    if case.direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return rival.run(case, x)

        return forward
    inputs = x.differentiated
    if case.direction == "both":
        return lambda: torch.autograd.grad(rival.run(case, x), inputs, x.dout)
    out = rival.run(case, x)
    return lambda: torch.autograd.grad(out, inputs, x.dout, retain_graph=True)


def _calibrate(case: Case, rival: Rival, x: Inputs, device: torch.device) -> _Entry | str:
    """Time of one call and its peak memory; the reason if the rival cannot take the case."""
    needed = case.score_bytes * _QUADRATIC_TENSORS[case.direction]
    if rival.quadratic and needed > 0.6 * available_bytes(device):
        return f"needs about {needed / 2**30:.0f} GiB for score matrices"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            with rival.context():
                entry = _Entry(rival)
                for _ in range(2):  # the first call loads and allocates what later ones find
                    with PeakMemory(device) as peak:  # a forward pass that is not timed included
                        call = _timed_call(case, rival, x)
                        begin = time.perf_counter()
                        call()
                        synchronize(device)
                        entry.call_s = time.perf_counter() - begin
                        del call
                    entry.peak_bytes = peak.bytes
                    if entry.call_s > _LONG_CALL_S:
                        break
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            return refusal_reason(rival.name, error, seen)
    return entry


def _time_once(case: Case, entry: _Entry, x: Inputs, device: torch.device) -> float:
    """Seconds per call."""
    with entry.rival.context():
        call = _timed_call(case, entry.rival, x)
        if device.type == "cuda":
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(_HEAD_START_CYCLES)
            begin.record()
            for _ in range(entry.calls):
                call()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) * 1e-3 / entry.calls
        start = time.perf_counter()
        for _ in range(entry.calls):
            call()
        return (time.perf_counter() - start) / entry.calls


def _warm_up(case: Case, entries: list[_Entry], sets: list[Inputs], plan: Plan) -> None:
    """Load for warmup_s, so that clocks and power have settled; calls per measurement follow."""
    end = time.perf_counter() + plan.warmup_s
    for entry in entries:
        kind = plan.device.type
        if entry.call_s < _LONG_CALL_S:
            entry.calls = _FEWEST_CALLS[kind]
            entry.call_s = _time_once(case, entry, sets[0], plan.device)
        wanted = round(_MEASUREMENT_S[kind] / max(entry.call_s, 1e-7))
        fewest = 1 if entry.call_s > 10 * _MEASUREMENT_S[kind] else _FEWEST_CALLS[kind]
        entry.calls = max(fewest, min(_MAX_CALLS, wanted))
    fastest = min(entries, key=lambda entry: entry.call_s)
    turn = 0
    while time.perf_counter() < end:
        _time_once(case, fastest, sets[turn % len(sets)], plan.device)
        turn += 1


def _rounds(
    case: Case, entries: list[_Entry], sets: list[Inputs], plan: Plan, order: random.Random
) -> None:
    """Rounds until the time is spent. A rival far slower than the best gets the fewest."""
    end = time.perf_counter() + plan.seconds
    present = list(entries)
    for turn in range(plan.rounds):
        if turn >= plan.min_rounds and time.perf_counter() > end:
            break
        if turn == plan.min_rounds:
            best = min(min(entry.samples) for entry in entries)
            present = [entry for entry in entries if min(entry.samples) < 10 * best]
        order.shuffle(present)
        for entry in present:
            sample = _time_once(case, entry, sets[turn % len(sets)], plan.device)
            entry.samples.append(sample)


def _summary(case: Case, entry: _Entry) -> dict[str, Any]:
    samples = sorted(entry.samples)
    median = statistics.median(samples)
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [median] * 3
    return {
        "median_s": median,
        "q1_s": quartiles[0],
        "q3_s": quartiles[2],
        "rounds": len(samples),
        "calls": entry.calls,
        "tflops": case.flops / median * 1e-12,
        "peak_bytes": entry.peak_bytes,
    }
