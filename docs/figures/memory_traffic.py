# SPDX-License-Identifier: BSD-3-Clause
"""Count the bytes that attention moves, and draw them: `python docs/figures/memory_traffic.py`.

docs/memory_hierarchy.md quotes these numbers; tests/benchmarks/test_docs.py compares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
GIB = 2.0**30


@dataclass(frozen=True)
class Problem:
    """The forward pass of `heads` heads (batch times heads) with as many keys as queries."""

    heads: int = 16
    seqlen: int = 16384
    head_dim: int = 128
    element_bytes: int = 2
    block_q: int = 128  # query rows that one block of the fused kernel holds on chip

    @property
    def operand_bytes(self) -> int:
        """Q, or K, or V, or O."""
        return self.heads * self.seqlen * self.head_dim * self.element_bytes

    @property
    def score_bytes(self) -> int:
        """S, or P: heads x seqlen x seqlen."""
        return self.heads * self.seqlen * self.seqlen * self.element_bytes

    @property
    def flops(self) -> int:
        return 4 * self.heads * self.seqlen * self.seqlen * self.head_dim


def standard_bytes(p: Problem) -> dict[str, tuple[int, int]]:
    """{kernel: (bytes read, bytes written)} of the formula as three kernels."""
    return {
        "S = Q K^T": (2 * p.operand_bytes, p.score_bytes),
        "P = softmax(S)": (p.score_bytes, p.score_bytes),
        "O = P V": (p.score_bytes + p.operand_bytes, p.operand_bytes),
    }


def fused_bytes(p: Problem) -> dict[str, tuple[int, int]]:
    """Q and O once; K and V once too, where the caches serve what later blocks read again."""
    return {"O = softmax(Q K^T) V": (3 * p.operand_bytes, p.operand_bytes)}


def fused_bytes_uncached(p: Problem) -> dict[str, tuple[int, int]]:
    """No cache at all: every block of queries fetches all of K and V."""
    blocks = -(-p.seqlen // p.block_q)
    return {"O = softmax(Q K^T) V": ((1 + 2 * blocks) * p.operand_bytes, p.operand_bytes)}


def total(traffic: dict[str, tuple[int, int]]) -> int:
    return sum(read + written for read, written in traffic.values())


# One H100 SXM, from its data sheet; shared memory: 128 bytes a clock on each of 132 cores.
HBM_BYTES_PER_S = 3.35e12
TENSOR_FLOPS = 989e12
LEVELS = [
    ("registers", "33 MB", "at each core"),
    ("shared memory", "30 MB", "31 TB/s"),
    ("L2 cache", "50 MB", "about 5.5 TB/s"),
    ("HBM", "80 GB", "3.35 TB/s"),
]

BLUE, RED, GREY, INK = "#1f6fb2", "#c2512f", "#8a8f98", "#23272e"
PALE_BLUE, PALE_RED, PALE_GREY = "#dcebf8", "#f8e2da", "#eceef1"


def draw_hierarchy(path: Path) -> Path:
    """The memories of a GPU, and what each way of computing sends through them."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    p = Problem()
    figure, axes = plt.subplots(figsize=(13.0, 7.3), dpi=130)
    axes.set_xlim(0, 130)
    axes.set_ylim(0, 73)
    axes.axis("off")

    def box(x, y, w, h, face, edge, text="", size=11, weight="normal", color=INK):
        axes.add_patch(
            FancyBboxPatch(
                (x, y),
                w,
                h,
                boxstyle="round,pad=0,rounding_size=1.0",
                facecolor=face,
                edgecolor=edge,
                linewidth=1.4,
            )
        )
        if text:
            axes.text(
                x + w / 2,
                y + h / 2,
                text,
                ha="center",
                va="center",
                fontsize=size,
                weight=weight,
                color=color,
                linespacing=1.35,
            )

    def arrow(x, y0, y1, color, width, text, side):
        axes.annotate(
            "",
            (x, y1),
            (x, y0),
            arrowprops={
                "arrowstyle": "-|>,head_width=0.35,head_length=0.6",
                "color": color,
                "lw": width,
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )
        axes.text(
            x + (0.9 if side == "right" else -0.9),
            (y0 + y1) / 2,
            text,
            color=INK,
            fontsize=9.5,
            ha="left" if side == "right" else "right",
            va="center",
            linespacing=1.3,
        )

    # Left: the levels, widest at the bottom.
    axes.text(0, 70.5, "Where the bytes live", fontsize=14, weight="bold", color=INK)
    axes.text(0, 67.3, "one H100: the fast memories are small", fontsize=10.5, color="#5b616b")
    for i, (name, size, rate) in enumerate(LEVELS):
        w = 17.5 + 3.6 * i
        y = 53.5 - 14.6 * i
        face, edge = (PALE_GREY, GREY) if i == 3 else (PALE_BLUE, BLUE)
        box(14 - w / 2 + 1, y, w, 11, face, edge, f"{name}\n{size}\n{rate}", 10.2)
    axes.text(33, 63.8, "fast", fontsize=10, color=BLUE, ha="center")
    axes.annotate(
        "", (33, 62.8), (33, 11.5), arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1.3}
    )
    axes.text(33, 9.0, "large", fontsize=10, color="#5b616b", ha="center")

    # Middle: three kernels.
    x0, x1 = 40, 88
    axes.text(x0, 70.5, "Standard: three kernels", fontsize=14, weight="bold", color=RED)
    axes.text(x0, 67.3, "the scores go to HBM and come back, twice", fontsize=10.5, color="#5b616b")
    kernels = standard_bytes(p)
    labels = {
        "S = Q K^T": "$S = QK^T$",
        "P = softmax(S)": "$P$ = softmax$(S)$",
        "O = P V": "$O = PV$",
    }
    reads = {"S = Q K^T": "Q, K", "P = softmax(S)": "S", "O = P V": "P, V"}
    writes = {"S = Q K^T": "S", "P = softmax(S)": "P", "O = P V": "O"}
    for i, (name, (read, written)) in enumerate(kernels.items()):
        x = x0 + i * 16.5
        box(x, 50, 14.5, 12, PALE_RED, RED, labels[name], 11.5)
        arrow(x + 3.4, 20, 50, RED, _width(read), f"{reads[name]}\n{_gib(read)}", "right")
        arrow(x + 11.0, 50, 20, RED, _width(written), "", "right")
        axes.text(
            x + 11.9,
            26.5,
            f"{writes[name]}\n{_gib(written)}",
            fontsize=9.5,
            color=INK,
            va="center",
            linespacing=1.3,
        )
    box(x0, 9, x1 - x0 - 0.5, 11, PALE_GREY, GREY, "HBM", 13, "bold")
    axes.text(
        (x0 + x1) / 2,
        4.6,
        f"{_gib(total(kernels))} moved",
        fontsize=14,
        weight="bold",
        color=RED,
        ha="center",
    )
    axes.text(
        (x0 + x1) / 2,
        1.2,
        f"{1e3 * total(kernels) / HBM_BYTES_PER_S:.1f} ms at 3.35 TB/s",
        fontsize=10.5,
        color="#5b616b",
        ha="center",
    )

    # Right: one kernel.
    x0, x1 = 96, 129
    axes.text(x0, 70.5, "Fused: one kernel", fontsize=14, weight="bold", color=BLUE)
    axes.text(x0, 67.3, "a tile of S lives and dies on the chip", fontsize=10.5, color="#5b616b")
    fused = fused_bytes(p)
    read, written = fused["O = softmax(Q K^T) V"]
    box(x0, 42, x1 - x0, 20, PALE_BLUE, BLUE)
    axes.text(
        (x0 + x1) / 2,
        59.5,
        "registers and shared memory",
        fontsize=10,
        color=BLUE,
        ha="center",
        va="center",
    )
    box(x0 + 1.3, 45, 8.4, 11, "white", BLUE, "$Q_i$", 13)
    box(x0 + 11.0, 45, 11.0, 11, "white", BLUE, "tile of\n$S$, $P$\n$m$, $\\ell$", 10.5)
    box(x0 + 23.3, 45, 8.4, 11, "white", BLUE, "$O_i$", 13)
    arrow(x0 + 6.5, 20, 42, BLUE, _width(read), f"Q, K, V\n{_gib(read)}", "right")
    arrow(x0 + 25.0, 42, 20, BLUE, _width(written), f"O\n{_gib(written)}", "right")
    box(x0, 9, x1 - x0, 11, PALE_GREY, GREY, "HBM", 13, "bold")
    axes.text(
        (x0 + x1) / 2,
        4.6,
        f"{_gib(total(fused))} moved",
        fontsize=14,
        weight="bold",
        color=BLUE,
        ha="center",
    )
    axes.text(
        (x0 + x1) / 2,
        1.2,
        f"{1e3 * total(fused) / HBM_BYTES_PER_S:.2f} ms at 3.35 TB/s",
        fontsize=10.5,
        color="#5b616b",
        ha="center",
    )
    figure.subplots_adjust(0.015, 0.015, 0.985, 0.985)
    figure.savefig(path)
    plt.close(figure)
    return path


def _gib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB" if count < GIB else f"{count / GIB:.2f} GiB"


def _width(count: int) -> float:
    """Line width of an arrow: thin for an operand, thick for the scores."""
    return 7.0 if count > 4 * GIB else 2.0


def draw_growth(path: Path) -> Path:
    """Bytes by sequence length: a square and a line."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    lengths = [512 * 2**i for i in range(8)]
    figure, axes = plt.subplots(figsize=(8.2, 4.8), dpi=130, layout="constrained")
    curves = [
        ("standard, three kernels", standard_bytes, RED, "-", "o"),
        ("fused, no cache at all", fused_bytes_uncached, BLUE, "--", None),
        ("fused, K and V of a head cached", fused_bytes, BLUE, "-", "o"),
    ]
    for label, count, color, style, marker in curves:
        y = [total(count(Problem(seqlen=n))) / GIB for n in lengths]
        axes.plot(lengths, y, style, color=color, lw=2.2, marker=marker, ms=6, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda n, _: f"{int(n) // 1024}k" if n >= 1024 else f"{int(n)}")
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color="#e3e5e8")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("sequence length")
    axes.set_ylabel("GiB moved to and from HBM")
    axes.set_title(
        "Forward pass of 16 heads, head dim 128, bf16", loc="left", weight="bold", fontsize=12
    )
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)
    return path


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    p = Problem()
    print(p)
    for name, traffic in (
        ("standard", standard_bytes(p)),
        ("fused", fused_bytes(p)),
        ("fused, no cache", fused_bytes_uncached(p)),
    ):
        moved = total(traffic)
        print(
            f"{name}: {moved:,} bytes = {moved / GIB:.3f} GiB,"
            f" {1e3 * moved / HBM_BYTES_PER_S:.2f} ms at HBM speed,"
            f" {p.flops / moved:.0f} FLOP a byte"
        )
    print(f"arithmetic: {p.flops / 1e12:.2f} TFLOP, {1e3 * p.flops / TENSOR_FLOPS:.2f} ms at peak")
    print(draw_hierarchy(HERE / "memory_hierarchy.png"))
    print(draw_growth(HERE / "memory_growth.png"))


if __name__ == "__main__":
    main()
