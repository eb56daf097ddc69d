# SPDX-License-Identifier: BSD-3-Clause
"""Tables from measured JSON, and README.md's agreement with the committed files."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.cases import self_attention


def timed(seconds: float, flops: float, peak: int = 0) -> dict[str, Any]:
    return {
        "median_s": seconds,
        "q1_s": 0.9 * seconds,
        "q3_s": 1.1 * seconds,
        "rounds": 5,
        "calls": 1,
        "tflops": flops / seconds * 1e-12,
        "peak_bytes": peak,
    }


def row(seqlen: int, causal: bool, seconds: dict[str, float | str]) -> dict[str, Any]:
    import dataclasses

    case = self_attention("forward", "fp32", (1, 8, 8), seqlen, 64, causal=causal)
    rivals = {
        name: {"refused": value} if isinstance(value, str) else timed(value, case.flops, 2**20)
        for name, value in seconds.items()
    }
    return {"case": case.name, **dataclasses.asdict(case), "rivals": rivals}


@pytest.fixture
def sample() -> dict[str, Any]:
    return {
        "schema": 1,
        "suite": "cpu-core",
        "machine": {
            "device_type": "cpu",
            "device": "a processor",
            "threads": 2,
            "torch": "2.13.0",
            "commit": "0123456789",
            "date": "2026-01-01",
        },
        "matmul_flops": {"fp32": {"before": 1e11, "after": 2e11}},
        "rows": [
            row(512, False, {"ours": 1e-3, "torch-flash": 2e-3, "eager": 4e-3}),
            row(1024, False, {"ours": 2e-3, "torch-flash": 1e-3, "eager": 16e-3}),
            row(512, True, {"ours": 1e-3, "torch-flash": 3e-3, "eager": "out of memory"}),
        ],
        "not_run": [],
    }


def cells(table: str, start: str) -> list[str]:
    [line] = [line for line in table.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ratios_are_geometric_means_of_rival_over_ours(sample: dict[str, Any]) -> None:
    table = report.ratio_table(sample)
    assert cells(table, "forward, fp32, full")[1:] == ["2", "1.00 (0.50-2.00)", "5.66 (4.00-8.00)"]
    assert cells(table, "forward, fp32, causal")[1:] == ["1", "3.00", "refused"]
    mean = (2.0 * 0.5 * 3.0) ** (1 / 3)
    assert cells(table, "**all**")[2] == f"{mean:.2f} (0.50-3.00)"
    assert cells(table, "**all**")[3] == f"{math.sqrt(32):.2f} (4.00-8.00, 2 cases)"


def test_rates_name_ours_and_the_best_fused_backend(sample: dict[str, Any]) -> None:
    sample["rows"][0]["rivals"]["torch-math"] = timed(1e-9, 1e12)  # not fused: not compared
    table = report.rate_table(sample)
    flops = 4 * 8 * 512 * 512 * 64
    line = cells(table, "forward, fp32, full, d 64, 1 x 8 heads")
    assert line[1] == f"{flops / 1e-3 * 1e-9:.0f} / {flops / 2e-3 * 1e-9:.0f}"
    causal = cells(table, "forward, fp32, causal, d 64, 1 x 8 heads")
    assert causal[1] == f"{flops / 2 / 1e-3 * 1e-9:.0f} / {flops / 2 / 3e-3 * 1e-9:.0f}"
    assert causal[2] == ""


def test_section_names_device_commit_and_what_was_not_run(sample: dict[str, Any]) -> None:
    sample["not_run"] = ["a", "b"]
    text = report.section("sample", sample)
    for part in ("a processor", "2 threads", "0123456789", "200 GFLOP/s", "2 cases of the suite"):
        assert part in text


def test_without_ours_there_is_no_ratio(sample: dict[str, Any]) -> None:
    for one in sample["rows"]:
        del one["rivals"]["ours"]
    assert cells(report.ratio_table(sample), "forward, fp32, full")[2:] == ["-", "-"]


def test_rewrite_replaces_only_what_is_between_markers() -> None:
    before = "head\n<!-- generated: a -->\nold\n<!-- end: a -->\ntail\n"
    after = report.rewrite(before, {"a": r"new \1"})
    assert after == "head\n<!-- generated: a -->\n\nnew \\1\n\n<!-- end: a -->\ntail\n"
    assert report.rewrite(after, {"a": r"new \1"}) == after
    with pytest.raises(SystemExit, match="no markers"):
        report.rewrite("nothing", {"a": "new"})


def test_load_skips_files_of_other_kinds(sample: dict[str, Any], tmp_path: Path) -> None:
    gpu = copy.deepcopy(sample)
    gpu["machine"]["device_type"] = "cuda"
    paths = []
    for name, content in {"a": sample, "b": gpu, "support": {"backends": {}}}.items():
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(content))
    assert list(report.load(paths)) == ["b", "a"]


def test_plot_is_drawn(sample: dict[str, Any], tmp_path: Path) -> None:
    plots = pytest.importorskip("benchmarks.plots", exc_type=ImportError)
    path = plots.draw(sample, tmp_path / "sample.png")
    assert path.stat().st_size > 10_000


def test_readme_agrees_with_committed_results() -> None:
    text = report.README.read_text()
    assert report.rewrite(text, report.generated_sections()) == text, (
        "run python -m benchmarks.report --readme"
    )


def test_training_table():
    """Rates and gains of what ran; what did not fit says so and has no gain."""
    from benchmarks.train import training_table

    def ran(rate: float) -> dict[str, Any]:
        return {"tokens_per_s": rate, "spread": 1.0, "peak_bytes": 3 * 2**30, "losses": [4.0]}

    attention = {
        "torch.softmax": {"refused": "does not fit"},
        "torch SDPA": ran(20_000.0),
        "flash_attn": ran(25_000.0),
    }
    table = training_table({"rows": [{"model": "m", "context": 4096, "attention": attention}]})
    row = table.splitlines()[-1]
    assert row == "| m, 4,096 | does not fit | 20,000; 3.0 GiB | 25,000; 3.0 GiB | 1.25 | - |"
