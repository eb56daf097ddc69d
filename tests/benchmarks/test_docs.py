# SPDX-License-Identifier: BSD-3-Clause
"""What the documents say about numbers and files is so."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "csrc/README.md")
] + sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


class Model(torch.nn.Module):
    """Something that the documents' snippets can swap attention in."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> types.SimpleNamespace:
        return types.SimpleNamespace(loss=self.attention(x, x, x)[0].sum())


@pytest.mark.parametrize("name", ["README.md", "docs/quick_start.md"])
def test_snippets_run(name: str) -> None:
    q, k, v = (torch.randn(2, 8, 8, 16, requires_grad=True) for _ in range(3))
    packed = {f"{t}_packed": torch.randn(12, 2, 16) for t in "qkv"}
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    names: dict[str, Any] = dict(
        q=q, k=k, v=v, model=Model(), batch=torch.randn(2, 8, 16),
        bias=torch.randn(8, 8), keep=torch.rand(2, 1, 8, 8) < 0.5,
        cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=7, max_seqlen_k=7, **packed,
        projection=torch.nn.Linear(16, 48), x=torch.randn(2, 8, 16), heads=2, head_dim=8,
    )  # fmt: skip
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, name, "exec"), names)
        if "out" in names:
            assert not names["out"].isnan().any(), block


def test_tree_of_readme_exists() -> None:
    text = (ROOT / "README.md").read_text()
    lines = text[text.index("## The tree") :].split("```")[1].strip("\n").splitlines()
    assert len(lines) >= 10
    parent = ROOT
    for line in lines:
        if line.startswith("  "):
            named = [parent / line.split()[0]]
        elif line.split()[0].endswith("/"):
            parent = ROOT / line.split()[0]
            named = [parent]
        else:
            named = [ROOT / name for name in line.split()]
        for path in named:
            assert path.exists(), path


def test_counted_bytes_of_the_memory_page() -> None:
    spec = importlib.util.spec_from_file_location(
        "memory_traffic", ROOT / "docs" / "figures" / "memory_traffic.py"
    )
    traffic = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = traffic
    spec.loader.exec_module(traffic)
    p = traffic.Problem()
    text = (ROOT / "docs" / "memory_hierarchy.md").read_text()
    rows = {
        "standard, three kernels": traffic.standard_bytes,
        "fused, no cache at all, blocks of 128 queries": traffic.fused_bytes_uncached,
        "fused, K and V of a head cached": traffic.fused_bytes,
    }
    for label, count in rows.items():
        moved = traffic.total(count(p))
        milliseconds = 1e3 * moved / traffic.HBM_BYTES_PER_S
        gib = f"{moved / 2**30 + 1e-9:.2f}"
        line = f"| {label} | {gib} GiB | {milliseconds:.2f} ms | {p.flops / moved:.0f} |"
        assert line in text
    n, d = p.seqlen, p.head_dim
    assert traffic.total(traffic.standard_bytes(p)) == 16 * 2 * (4 * n * d + 4 * n * n)
    assert traffic.total(traffic.fused_bytes(p)) == 16 * 2 * 4 * n * d
    assert f"{p.flops / 1e12:.2f} TFLOP, {1e3 * p.flops / traffic.TENSOR_FLOPS:.2f} ms" in text
