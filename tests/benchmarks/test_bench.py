# SPDX-License-Identifier: BSD-3-Clause
"""The measuring tool: what it counts, whom it measures, how it reports refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import bench, rivals, timing
from benchmarks.cases import SUITES, Case, self_attention

CPU = torch.device("cpu")


def test_names_are_unique() -> None:
    for suite, cases in SUITES.items():
        names = [case.name for case in cases()]
        assert len(names) == len(set(names)), suite


def test_cuda_suite_is_the_published_shape() -> None:
    cases = list(SUITES["cuda"]())
    assert len(cases) == 2 * 3 * 2 * 6
    for case in cases:
        assert case.batch * case.seqlen_q == 16384 and case.heads * case.head_dim == 2048


def test_flops() -> None:
    full = self_attention("forward", "fp32", (2, 3, 3), 10, 16)
    assert full.flops == 4 * 2 * 3 * 10 * 10 * 16
    causal = self_attention("backward", "fp32", (2, 3, 3), 10, 16, causal=True)
    assert causal.flops == full.flops * 2.5 / 2
    uneven = self_attention("both", "fp32", (2, 3, 3), 10, 16, head_dim_v=48)
    assert uneven.flops == full.flops * 2 * 3.5


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_rivals_are_interleaved_and_summarised(
    direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = self_attention(direction, "fp32", (1, 2, 2), 32, 16)
    order: list[str] = []

    def logged(name: str) -> rivals.Rival:
        def run(case: Case, x: rivals.Inputs) -> torch.Tensor:
            order.append(name)
            return rivals.eager(case, x)

        return rivals.Rival(name, run)

    def refuses(case: Case, x: rivals.Inputs) -> torch.Tensor:
        raise RuntimeError("not today\nnor tomorrow")

    monkeypatch.setattr(timing, "_MAX_CALLS", 1)
    plan = timing.Plan(CPU, seconds=10.0, rounds=24, warmup_s=0.0)
    everyone = [logged("a"), rivals.Rival("no", refuses), logged("b")]
    results = timing.measure(case, everyone, plan)
    assert list(results) == ["a", "no", "b"]
    assert results["no"] == {"refused": "not today"}
    for name in ("a", "b"):
        result = results[name]
        assert result["q1_s"] <= result["median_s"] <= result["q3_s"]
        assert result["tflops"] == pytest.approx(case.flops / result["median_s"] * 1e-12)
    rounds = order[-2 * 3 :]
    assert sorted(rounds[:2]) == sorted(rounds[2:4]) == sorted(rounds[4:]) == ["a", "b"]
    pairs = {tuple(order[i : i + 2]) for i in range(len(order) - 48, len(order), 2)}
    if results["a"]["rounds"] == results["b"]["rounds"] == 24:
        assert pairs == {("a", "b"), ("b", "a")}, "the order is drawn anew each round"


def test_score_matrices_that_do_not_fit_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "available_bytes", lambda device: 1 << 20)
    case = self_attention("forward", "fp32", (1, 8, 8), 1024, 16)
    plan = timing.Plan(CPU, seconds=0.0, rounds=1, warmup_s=0.0)
    results = timing.measure(case, [rivals.make_rival("eager")], plan)
    assert "GiB for score matrices" in results["eager"]["refused"]


@pytest.mark.parametrize("mask", ["none", "bool", "bias"])
@pytest.mark.parametrize("heads_k", [4, 2])
def test_eager_is_the_formula(mask: str, heads_k: int) -> None:
    case = self_attention(
        "forward", "fp64", (2, 4, heads_k), 9, 8, causal=mask == "none", head_dim_v=6, mask=mask
    )
    x = rivals.make_inputs(case, CPU, seed=torch.seed() % 2**31)
    group = 4 // heads_k
    expected = torch.zeros(2, 4, 9, 6, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            scores = x.q[b, h] @ x.k[b, h // group].T / math.sqrt(8)
            if mask == "none":
                scores += torch.full((9, 9), -math.inf, dtype=torch.float64).triu(1)
            elif mask == "bool":
                scores[~x.mask[b, 0]] = -math.inf
            else:
                scores += x.mask[0, h]
            expected[b, h] = scores.softmax(-1) @ x.v[b, h // group]
    torch.testing.assert_close(rivals.eager(case, x), expected)


def test_unknown_rival_is_named() -> None:
    with pytest.raises(SystemExit, match="unknown rival 'theirs'"):
        rivals.make_rival("theirs")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    arguments = ["--suite", "smoke", "--check", "--rounds", "2", "--seconds", "20", "--warmup", "0"]
    assert bench.main([*arguments, "--only", "n64", "--output", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["schema"] == bench.SCHEMA and found["rows"] and not found["not_run"]
    assert found["machine"]["threads"] == torch.get_num_threads()
    for row in found["rows"]:
        ours = row["rivals"]["ours"]
        assert "refused" not in ours, (row["case"], ours)
        if row["dropout_p"] == 0:
            assert ours["max_error"] < 1e-5, row["case"]
    assert "ours" in capsys.readouterr().out


def test_time_limit_names_what_it_dropped(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    bench.main(["--suite", "smoke", "--rivals", "eager", "--seconds", "0", "--output", str(path)])
    found = json.loads(path.read_text())
    assert len(found["not_run"]) == len(list(SUITES["smoke"]())) and not found["rows"]
