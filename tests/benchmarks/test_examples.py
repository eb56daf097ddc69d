# SPDX-License-Identifier: BSD-3-Clause
"""The examples run, with tiny settings, as a user would run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_train_gpt(tmp_path: Path) -> None:
    out = run(
        "train_gpt.py",
        *("--device", "cpu", "--steps", "4", "--context", "64", "--batch", "2", "--width", "64"),
        *("--layers", "2", "--lengths", "32", "64", "--output", str(tmp_path)),
    )
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["losses"]) == ["torch.softmax", "torch SDPA", "flash_attn"]
    base = found["losses"]["torch.softmax"]
    assert len(base) == 4 and base[-1] < base[0]
    for losses in found["losses"].values():
        assert losses == pytest.approx(base, abs=1e-4)
    for row in found["parity"]:
        assert all(float(row[key]) < 1e-4 for key in ("out", "dq", "dk", "dv"))
    assert len(found["scaling"]) == 2 * 3
    assert all(row["tokens_per_s"] > 0 and row["peak_bytes"] > 2**20 for row in found["scaling"])
    if "no plots" not in out:
        for picture in ("loss.png", "tokens_per_second.png", "memory.png"):
            assert str(tmp_path / picture) in out
            assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_swap_mha() -> None:
    out = run("swap_mha.py", "--length", "48", "--width", "64", "--repeats", "1")
    assert "replaced 2 modules by MultiheadAttention" in out
    gaps = [line for line in out.splitlines() if line.startswith("largest difference")]
    assert len(gaps) == 2 and all(float(line.split()[4]) < 1e-4 for line in gaps)


def test_varlen() -> None:
    out = run("varlen.py", "--longest", "40", "--sequences", "5", "--repeats", "1")
    [gap] = [line for line in out.splitlines() if line.startswith("largest difference")]
    assert float(gap.split()[-1]) < 1e-5
