# SPDX-License-Identifier: BSD-3-Clause
"""Throughput by sequence length, one panel a group of cases."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .report import ordered_rows, pattern_of, rival_names

COLORS = {
    "ours": "#1f6fb2",
    "ours:sm80": "#5aa9e6",
    "ours:simt": "#a9cfee",
    "torch": "#5b616b",
    "torch-flash": "#8a8f98",
    "torch-efficient": "#7a9a5b",
    "torch-cudnn": "#8f6fb0",
    "torch-math": "#d9a441",
    "eager": "#c2512f",
}
STYLE = {
    "figure.dpi": 130,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e5e8",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def draw(report: dict[str, Any], path: Path) -> Path:
    """One line a rival, one panel a (direction, dtype, mask, head dim)."""
    panels = _panels(report)
    names = rival_names(report)
    dims = {row["head_dim"] for row in report["rows"]}
    columns = max(1, min(3 if len(dims) == 3 else 4, len(panels)))
    lines = max(1, -(-len(panels) // columns))
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            lines,
            columns,
            figsize=(3.1 * columns + 0.4, 2.6 * lines + 0.9),
            squeeze=False,
            layout="constrained",
        )
        for axes, (title, rows) in zip(grid.flat, panels.items(), strict=False):
            _panel(axes, title, rows, names, report["machine"]["device_type"])
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        handles = [
            plt.Line2D([], [], color=_color(name), marker="o", ms=4, label=name) for name in names
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(names)))
        facts = report["machine"]
        unit = "TFLOP/s" if facts["device_type"] == "cuda" else "GFLOP/s"
        figure.suptitle(
            f"{unit} by sequence length: {facts['device']}, torch {facts['torch']}", fontsize=12
        )
        figure.savefig(path)
        plt.close(figure)
    return path


def _panels(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows by panel; where a panel would hold several head counts, the one with most lengths."""
    groups: dict[str, dict[tuple[int, int], list[dict[str, Any]]]] = {}
    for row in ordered_rows(report):
        if row["seqlen_q"] != row["seqlen_k"]:
            continue
        dim = f"d {row['head_dim']}"
        if row["head_dim_v"] != row["head_dim"]:
            dim += f", d_v {row['head_dim_v']}"
        title = f"{row['direction']}, {row['dtype']}, {pattern_of(row)}, {dim}"
        shapes = groups.setdefault(title, defaultdict(list))
        shapes[row["heads"], row["heads_k"]].append(row)
    return {
        title: sorted(max(shapes.values(), key=len), key=lambda row: row["seqlen_q"])
        for title, shapes in groups.items()
    }


def _color(name: str) -> str:
    return COLORS.get(name, "#333333")


def _panel(
    axes: Axes, title: str, rows: list[dict[str, Any]], names: list[str], device_type: str
) -> None:
    scale = 1.0 if device_type == "cuda" else 1e3
    for name in names:
        points = [
            (row["seqlen_q"], row["rivals"][name]["tflops"] * scale)
            for row in rows
            if "tflops" in row["rivals"].get(name, {})
        ]
        if points:
            width = 2.4 if name == "ours" else 1.4
            axes.plot(
                *zip(*points, strict=True),
                color=_color(name),
                lw=width,
                marker="o",
                ms=4,
                zorder=3 if name == "ours" else 2,
            )
    lengths = [row["seqlen_q"] for row in rows]
    axes.set_title(title)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda n, _: f"{int(n) // 1024}k" if n >= 1024 else f"{int(n)}")
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
