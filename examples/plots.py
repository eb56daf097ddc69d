# SPDX-License-Identifier: BSD-3-Clause
"""The demo's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

COLORS = {"torch.softmax": "#c2512f", "torch SDPA": "#8a8f98", "flash_attn": "#1f6fb2"}
STYLE = {
    "figure.figsize": (8.0, 4.8),
    "figure.dpi": 150,
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e5e8",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 2.2,
}


def draw(
    losses: dict[str, list[float]], scaling: list[dict[str, Any]], where: str, folder: Path
) -> list[Path]:
    with plt.rc_context(STYLE):
        paths = [_draw_losses(losses, where, folder / "loss.png")]
        if scaling:
            paths.append(
                _draw_scaling(
                    scaling,
                    "tokens_per_s",
                    1.0,
                    "Tokens per second of a training step",
                    where,
                    folder / "tokens_per_second.png",
                )
            )
            paths.append(
                _draw_scaling(
                    scaling,
                    "peak_bytes",
                    2.0**-20,
                    "Peak memory of a training step (MiB)",
                    where,
                    folder / "memory.png",
                )
            )
    return paths


def _smooth(values: list[float], window: int) -> list[float]:
    """Mean of the last `window` values at every step."""
    total, out = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        out.append(total / min(i + 1, window))
    return out


def _draw_losses(losses: dict[str, list[float]], where: str, path: Path) -> Path:
    """Three curves that lie on each other, and below them how far apart they are."""
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(8.0, 6.2), sharex=True, height_ratios=[2.2, 1], layout="constrained"
    )
    widths = {"torch.softmax": 7.0, "torch SDPA": 4.2, "flash_attn": 1.8}
    count = len(next(iter(losses.values())))
    window = max(1, count // 25)
    for name, values in losses.items():
        upper.plot(_smooth(values, window), color=COLORS[name], lw=widths[name], label=name)
    upper.set_title(f"Loss: three attentions, one curve   ({where})", fontsize=12)
    upper.set_ylabel("cross entropy, nats a character")
    upper.legend()
    base = losses["torch.softmax"]
    for name in ("torch SDPA", "flash_attn"):
        gap = [abs(a - b) for a, b in zip(losses[name], base, strict=True)]
        lower.plot(gap, color=COLORS[name], lw=1.2, label=name)
    lower.set_yscale("symlog", linthresh=1e-7)
    lower.set_ylim(bottom=0)
    lower.yaxis.set_major_locator(FixedLocator([0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]))
    lower.yaxis.set_minor_locator(NullLocator())
    lower.set_ylabel("|loss - softmax's|")
    lower.set_xlabel("step")
    figure.savefig(path)
    plt.close(figure)
    return path


def _draw_scaling(
    rows: list[dict[str, Any]], key: str, scale: float, title: str, where: str, path: Path
) -> Path:
    figure, axes = plt.subplots(layout="constrained")
    lengths = sorted({row["length"] for row in rows})
    last: dict[str, float] = {}
    for name, color in COLORS.items():
        points = [
            (row["length"], row[key] * scale)
            for row in rows
            if row["attention"] == name and key in row
        ]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        wide = name == "torch SDPA"  # ours is drawn over it and often hides it
        axes.plot(
            x,
            y,
            color=color,
            marker="o",
            ms=10 if wide else 6,
            lw=5 if wide else 2.2,
            alpha=0.6 if wide else 1.0,
            label=name,
        )
        if x[-1] == lengths[-1]:
            last[name] = y[-1]
        else:
            axes.annotate(
                "not measured beyond",
                (x[-1], y[-1]),
                xytext=(8, -4),
                textcoords="offset points",
                color=color,
                fontsize=9,
            )
    axes.set_title(f"{title}\n", pad=2)
    axes.text(0, 1.02, where, transform=axes.transAxes, color="#5b616b", fontsize=10)
    _log_axes(axes, lengths)
    if {"torch.softmax", "flash_attn"} <= last.keys():
        _mark_factor(axes, lengths[-1], last["torch.softmax"], last["flash_attn"])
    axes.set_xlabel("sequence length")
    axes.legend()
    figure.savefig(path)
    plt.close(figure)
    return path


def _mark_factor(axes: Axes, x: float, softmax: float, ours: float) -> None:
    """An arrow from the softmax formula to ours, with the factor between them."""
    axes.annotate(
        "",
        (x, ours),
        (x, softmax),
        arrowprops={"arrowstyle": "-|>", "color": "#5b616b", "shrinkA": 8, "shrinkB": 8},
    )
    factor = max(softmax, ours) / min(softmax, ours)
    axes.annotate(
        f"{factor:.1f}x",
        (x, (softmax * ours) ** 0.5),
        xytext=(-8, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        weight="bold",
    )


def _log_axes(axes: Axes, lengths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{int(x):,}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
