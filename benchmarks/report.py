# SPDX-License-Identifier: BSD-3-Clause
"""Tables and plots from measured JSON: `python -m benchmarks.report --readme`.

Without options it prints the tables of the files given (default: benchmarks/results/*.json).
`--readme` rewrites the generated sections of README.md, `--check` fails where they differ,
`--plots` draws a PNG beside each file.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from .machine import ROOT
from .support import SUPPORT_JSON, support_table
from .train import training_table

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
Row = dict[str, Any]

_DIRECTION_NAMES = {
    "forward": "forward",
    "backward": "backward",
    "both": "forward + backward",
}


def load(paths: list[Path] | None = None) -> dict[str, dict[str, Any]]:
    """{file stem: report}; only files of benchmarks.bench, GPU results first."""
    found = sorted(RESULTS.glob("*.json")) if paths is None else paths
    reports = {}
    for path in found:
        content = json.loads(path.read_text())
        if "rows" in content and content.get("schema") == 1:
            reports[path.stem] = content
    return dict(sorted(reports.items(), key=lambda item: (_rank(item[1]), item[0])))


def _rank(report: dict[str, Any]) -> int:
    return 0 if report["machine"]["device_type"] == "cuda" else 1


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def pattern_of(row: Row) -> str:
    """full, causal, ... as in Case.pattern, read back from its name."""
    return row["case"].split("-")[3]


def ordered_rows(report: dict[str, Any]) -> list[Row]:
    """Forward before backward, full before causal, head dims and lengths ascending."""

    def key(row: Row) -> tuple[Any, ...]:
        direction = list(_DIRECTION_NAMES).index(row["direction"])
        shape = (row["head_dim"], row["head_dim_v"], row["heads"], -row["heads_k"])
        pattern = pattern_of(row)
        return direction, row["dtype"], pattern != "full", pattern, *shape, row["seqlen_q"]

    return sorted(report["rows"], key=key)


def rival_names(report: dict[str, Any]) -> list[str]:
    """In the order measured, without those that refused every case."""
    names: dict[str, bool] = {}
    for row in report["rows"]:
        for name, result in row["rivals"].items():
            names[name] = names.get(name, False) or "median_s" in result
    return [name for name, ran in names.items() if ran]


def _ratio(row: Row, rival: str) -> float | None:
    """Time of the rival over ours: above 1, ours is faster."""
    ours, other = row["rivals"].get("ours", {}), row["rivals"].get(rival, {})
    if "median_s" not in ours or "median_s" not in other:
        return None
    return other["median_s"] / ours["median_s"]


def ratio_table(report: dict[str, Any]) -> str:
    """Geometric means of rival time / our time, with the least and the greatest case."""
    rivals = [n for n in rival_names(report) if n != "ours" and not n.startswith("ours")]
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in ordered_rows(report):
        kind = pattern_of(row)
        if row["head_dim_v"] != row["head_dim"]:
            kind += f", d {row['head_dim']}, d_v {row['head_dim_v']}"
        if row["seqlen_q"] == 1:
            kind += ", one query"
        groups[row["direction"], row["dtype"], kind].append(row)
    lines = []
    for (direction, dtype, kind), rows in groups.items():
        cells = [f"{_DIRECTION_NAMES[direction]}, {dtype}, {kind}", str(len(rows))]
        cells += [_ratio_cell(rows, rival) for rival in rivals]
        lines.append(cells)
    if len(lines) > 1:
        every = [_ratio_cell(report["rows"], rival) for rival in rivals]
        lines.append(["**all**", str(len(report["rows"])), *every])
    return markdown_table(["cases", "number", *rivals], lines)


def _ratio_cell(rows: list[Row], rival: str) -> str:
    ratios = [_ratio(row, rival) for row in rows]
    known = [r for r in ratios if r is not None]
    if not known:
        refused = all("refused" in row["rivals"].get(rival, {}) for row in rows)
        return "refused" if refused else "-"
    few = "" if len(known) == len(ratios) else f", {len(known)} cases"
    spread = f" ({min(known):.2f}-{max(known):.2f}{few})" if len(known) > 1 else ""
    return f"{geometric_mean(known):.2f}{spread}"


def rate_table(report: dict[str, Any]) -> str:
    """TFLOP/s (CPU: GFLOP/s) by length: ours / the best of torch's fused backends."""
    scale, digits = (1.0, 0) if report["machine"]["device_type"] == "cuda" else (1e3, 0)
    groups: dict[str, dict[int, str]] = defaultdict(dict)
    for row in ordered_rows(report):
        if row["seqlen_q"] != row["seqlen_k"]:
            continue
        ours = row["rivals"].get("ours", {}).get("tflops")
        fused = [
            result["tflops"]
            for name, result in row["rivals"].items()
            if name.startswith("torch-") and name != "torch-math" and "tflops" in result
        ]
        best = f"{max(fused) * scale:.{digits}f}" if fused else "-"
        mine = f"{ours * scale:.{digits}f}" if ours is not None else "-"
        where = f"{_DIRECTION_NAMES[row['direction']]}, {row['dtype']}, {pattern_of(row)}, "
        where += f"d {row['head_dim']}"
        if row["head_dim_v"] != row["head_dim"]:
            where += f", d_v {row['head_dim_v']}"
        if report["machine"]["device_type"] != "cuda":
            where += f", {row['batch']} x {row['heads']} heads"
            where += f" ({row['heads_k']} of k, v)" if row["heads"] != row["heads_k"] else ""
        groups[where][row["seqlen_q"]] = f"{mine} / {best}"
    lengths = sorted({length for cells in groups.values() for length in cells})
    lines = [[where, *(cells.get(n, "") for n in lengths)] for where, cells in groups.items()]
    return markdown_table(["case", *(f"{n:,}" for n in lengths)], lines)


def memory_table(report: dict[str, Any]) -> str:
    """Peak MiB beyond the inputs at the longest length of each group."""
    rivals = rival_names(report)
    longest = max(row["seqlen_q"] for row in report["rows"])
    lines = []
    for row in ordered_rows(report):
        if row["seqlen_q"] != longest or pattern_of(row) != "full":
            continue
        cells = [row["case"]]
        for rival in rivals:
            peak = row["rivals"].get(rival, {}).get("peak_bytes")
            cells.append("-" if peak is None else f"{peak / 2**20:,.0f}")
        lines.append(cells)
    return markdown_table(["case", *rivals], lines) if lines else ""


def revision(facts: dict[str, Any]) -> str:
    """Of the extension that ran; of the tree where none did, or none is told."""
    build = facts.get("flash_attn") or {}
    return str(build.get("source_revision", facts["commit"])[:10])


def describe(report: dict[str, Any]) -> str:
    facts = report["machine"]
    parts = [f"**{facts['device']}**"]
    parts.append(f"{facts['threads']} threads" if facts["device_type"] == "cpu" else "")
    parts.append(f"torch {facts['torch']}")
    if facts.get("cudnn"):
        parts.append(f"cuDNN {facts['cudnn']}, driver {facts.get('driver')}")
    rates = []
    for dtype, rate in report["matmul_flops"].items():
        value = max(rate["before"], rate.get("after", 0.0))
        rates.append(
            f"{dtype} {value * 1e-12:.0f} TFLOP/s"
            if facts["device_type"] == "cuda"
            else f"{dtype} {value * 1e-9:.0f} GFLOP/s"
        )
    parts.append(f"matrix product {', '.join(rates)}")
    parts.append(f"commit {revision(facts)}, {facts['date']}")
    return "; ".join(part for part in parts if part)


def section(stem: str, report: dict[str, Any]) -> str:
    unit = "TFLOP/s" if report["machine"]["device_type"] == "cuda" else "GFLOP/s"
    dtypes = ", ".join(sorted({row["dtype"] for row in report["rows"]}))
    parts = [
        f"### Suite `{report['suite']}`, {dtypes}",
        describe(report) + f". Figures: [`{stem}.json`](benchmarks/results/{stem}.json).",
        "Time of the rival divided by ours; geometric mean (least-greatest). "
        "Above 1, ours is faster.",
        ratio_table(report),
    ]
    picture = RESULTS / f"{stem}.png"
    if picture.exists():
        parts.append(f"![{report['suite']}](benchmarks/results/{stem}.png)")
    fused = any(n == "torch-flash" for n in rival_names(report))
    if fused:
        parts += [
            "<details><summary>" + unit + " by length: ours / the best fused backend of torch"
            "</summary>",
            rate_table(report),
            "</details>",
        ]
    memory = memory_table(report)
    if memory:
        parts += [
            "<details><summary>Peak memory beyond the inputs, MiB, at the greatest length"
            "</summary>",
            memory,
            "</details>",
        ]
    if report["not_run"]:
        parts.append(f"{len(report['not_run'])} cases of the suite were not run (time limit).")
    return "\n\n".join(parts)


def training_section(path: Path) -> str:
    """What benchmarks.train measured on one device."""
    report = json.loads(path.read_text())
    facts = report["machine"]
    parts = [
        f"**{facts['device']}**; torch {facts['torch']}; commit {revision(facts)}, "
        f"{facts['date']}. "
        f"Tokens per second of a training step of {report['tokens']:,} tokens in bf16, and its "
        "peak memory beyond weights and optimizer. Figures: "
        f"[`{path.name}`](benchmarks/results/{path.name}).",
        training_table(report),
    ]
    if path.with_suffix(".png").exists():
        parts.append(f"![loss](benchmarks/results/{path.stem}.png)")
    return "\n\n".join(parts)


def generated_sections() -> dict[str, str]:
    """{marker name: text} of everything in README.md that is made from committed JSON."""
    reports = load()
    measured = "\n\n".join(section(stem, report) for stem, report in reports.items())
    trained = [training_section(path) for path in sorted(RESULTS.glob("*-train.json"))]
    support = "No figures yet."
    if SUPPORT_JSON.exists():
        support = support_table(json.loads(SUPPORT_JSON.read_text()))
    return {
        "support": support,
        "measurements": measured or "No figures yet.",
        "training": "\n\n".join(trained) or "No figures yet.",
    }


def rewrite(text: str, sections: dict[str, str]) -> str:
    """Put each section between its markers `<!-- generated: NAME -->` and `<!-- end: NAME -->`."""
    for name, content in sections.items():
        begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        if begin not in text or end not in text:
            raise SystemExit(f"README.md has no markers {begin} ... {end}")
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        body = f"{begin}\n\n{content}\n\n{end}"
        text = re.sub(pattern, lambda _, body=body: body, text, flags=re.DOTALL)
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--readme", action="store_true", help="rewrite README.md")
    parser.add_argument("--check", action="store_true", help="fail if README.md is out of date")
    parser.add_argument("--plots", action="store_true", help="a PNG beside each file")
    arguments = parser.parse_args(argv)
    if arguments.plots:
        from .plots import draw

        for path in arguments.files or [RESULTS / f"{stem}.json" for stem in load()]:
            print(draw(json.loads(path.read_text()), path.with_suffix(".png")))
    if arguments.readme or arguments.check:
        before = README.read_text()
        after = rewrite(before, generated_sections())
        if arguments.check and before != after:
            print("README.md is out of date: run python -m benchmarks.report --readme")
            return 1
        if arguments.readme:
            README.write_text(after)
    elif not arguments.plots:
        for stem, report in load(arguments.files or None).items():
            print(section(stem, report), end="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
