# SPDX-License-Identifier: BSD-3-Clause
"""Draw the schedules of the Hopper kernels: `python docs/figures/hopper_schedule.py`.

A model, not a measurement: one core, 4096 operations of the tensor cores and 16 exponentials a
clock. docs/hopper.md says what the hardware adds.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEPS = 5
TENSOR_CORES = "tensor cores"
COLOURS = {
    "S": "#1f6fb2",
    "P V": "#c2512f",
    "softmax": "#4f8f4a",
    "P": "#4f8f4a",
    "dP": "#d49a2a",
    "dS": "#7a5ea8",
    "dV": "#c2512f",
    "dK": "#8a5a44",
    "dQ": "#5b616b",
}


def product(rows: int, columns: int, depth: int) -> int:
    """Clocks of a rows x columns x depth product on the tensor cores."""
    return 2 * rows * columns * depth // 4096


def exponentials(rows: int, columns: int) -> int:
    """Clocks of a tile's exponentials; the rest of its arithmetic is issued beside them."""
    return rows * columns // 16


@dataclass
class Bar:
    lane: str
    name: str
    step: int
    begin: float
    end: float


class Schedule:
    """Things in the order in which they are issued; each starts when its lane is free and what it
    needs is done."""

    def __init__(self) -> None:
        self.bars: list[Bar] = []
        self.done: defaultdict[tuple[str, int, int], float] = defaultdict(float)
        self.free: defaultdict[str, float] = defaultdict(float)

    def add(self, name: str, group: int, step: int, clocks: int, *needs: tuple[str, int, int]):
        is_product = name not in ("softmax", "P", "dS")
        lane = TENSOR_CORES if is_product else f"warpgroup {group + 1}"
        begin = max([self.free[lane], *(self.done[need] for need in needs)])
        self.done[name, group, step] = self.free[lane] = begin + clocks
        self.bars.append(Bar(lane, name, step, begin, begin + clocks))


def forward(head_dim: int, keys: int, groups: int) -> Schedule:
    """In turns: S(n), and behind it P(n - 1) V; under that, the softmax of S(n)."""
    s = Schedule()
    for n in range(STEPS):
        for g in range(groups):
            before = ("softmax", g, n - 1)
            s.add("S", g, n, product(64, keys, head_dim), before, ("P V", g, n - 2))
            if n > 0:
                s.add("P V", g, n - 1, product(64, head_dim, keys), before)
            s.add("softmax", g, n, exponentials(64, keys), ("S", g, n))
    return s


def backward(head_dim: int, queries: int) -> Schedule:
    """Two warpgroups of 64 keys; dQ by the first, over the keys of both."""
    s = Schedule()
    for m in range(STEPS):
        for g in (0, 1):
            s.add("S", g, m, product(64, queries, head_dim), ("dK", g, m - 1))
            s.add("dP", g, m, product(64, queries, head_dim))
            s.add("P", g, m, exponentials(64, queries), ("S", g, m))
            s.add("dS", g, m, exponentials(64, queries) // 2, ("P", g, m), ("dP", g, m))
        for g in (0, 1):
            s.add("dV", g, m, product(64, head_dim, queries), ("P", g, m))
        s.add("dQ", 0, m, product(queries, head_dim, 128), ("dS", 0, m), ("dS", 1, m))
        for g in (0, 1):
            s.add("dK", g, m, product(64, head_dim, queries), ("dS", g, m))
    return s


PANELS = [
    ("Forward, head dim 128: softmax takes half as long as the products", forward(128, 128, 2), 2),
    ("Forward, head dim 64: as long; three warpgroups take turns at both", forward(64, 128, 3), 3),
    ("Backward, head dim 128: five products; P and dS of one under those of the other",
     backward(128, 64), 2),
]  # fmt: skip


def draw(path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(
        len(PANELS), 1, figsize=(13, 8.2), dpi=110, layout="constrained",
        height_ratios=[groups + 1.6 for *_, groups in PANELS],
    )  # fmt: skip
    for axes, (title, schedule, groups) in zip(all_axes, PANELS, strict=True):
        lanes = [TENSOR_CORES, *(f"warpgroup {g + 1}" for g in range(groups))]
        end = max(bar.end for bar in schedule.bars if bar.step < STEPS - 1)
        for bar in schedule.bars:
            y = len(lanes) - 1 - lanes.index(bar.lane)
            width = bar.end - bar.begin
            alpha = 0.95 if bar.step % 2 else 0.7
            axes.barh(y, width, left=bar.begin, height=0.72, color=COLOURS[bar.name], alpha=alpha,
                      edgecolor="white", linewidth=1.2)  # fmt: skip
            if width > 0.015 * end:
                axes.text(bar.begin + width / 2, y, bar.name, ha="center", va="center",
                          color="white", fontsize=9, clip_on=True)  # fmt: skip
        axes.set_yticks(range(len(lanes)), reversed(lanes))
        axes.set_xlim(0, end)
        axes.set_title(title, loc="left", fontsize=12)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
    all_axes[-1].set_xlabel("clocks of one core; light and dark: one step and the next")
    figure.savefig(path)
    plt.close(figure)
    return path


if __name__ == "__main__":
    print(draw(HERE / "hopper_schedule.png"))
