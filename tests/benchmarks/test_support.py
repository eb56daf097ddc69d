# SPDX-License-Identifier: BSD-3-Clause
"""The support matrix says what `can_use` says."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import support


def test_table_numbers_each_reason_once() -> None:
    rows = dict.fromkeys(support.ROWS, "")
    refusing = rows | {"float32": "16-bit types only", "float64": "16-bit types only"}
    partial = {"float16": "not compiled"}
    table = support.support_table(
        {
            "backends": {
                "cpu": {"device": "any CPU", "rows": rows},
                "sm80": {"device": "a card", "rows": refusing},
                "new": {"device": "b card", "rows": partial},
            }
        }
    )
    assert "| float16 | yes | yes | no [1] |" in table
    assert "| float32 | yes | no [2] | ? |" in table
    assert "| float64 | yes | no [2] | ? |" in table
    assert table.count("16-bit types only") == 1
    assert "2. 16-bit types only" in table


@pytest.mark.parametrize("backend", ["cpu", "simt", "sm80", "sm90"])
def test_committed_answers_are_what_this_build_says(backend: str) -> None:
    device = support.backend_devices().get(backend)
    if device is None:
        pytest.skip(f"{backend} is not in this build, or its device is not here")
    recorded = json.loads(support.SUPPORT_JSON.read_text())["backends"].get(backend)
    if device == "cuda":
        here = torch.cuda.get_device_name()
        if recorded is None or recorded["device"] != here:
            pytest.skip(f"not recorded on {here}")
    answers = {row: support.ask(backend, device, change) for row, change in support.ROWS.items()}
    assert recorded["rows"] == answers


def test_a_refusal_has_a_reason() -> None:
    assert support.ask("cpu", "cpu", {}) == ""
    assert support.ask("simt", "cpu", {}) != ""
