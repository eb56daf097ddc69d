# SPDX-License-Identifier: BSD-3-Clause
"""What each backend takes, asked of `flash_attn.can_use`: `python -m benchmarks.support`.

Writes benchmarks/results/support.json. Backends whose device is not here keep what was recorded
for them before, so that one run on a GPU machine and one on a CPU machine make the whole table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from .machine import ROOT

SUPPORT_JSON = ROOT / "benchmarks" / "results" / "support.json"

_DEFAULT = {"dtype": "bf16", "head_dim": 64, "head_dim_v": 64, "heads_k": 4}
_DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
# Row of the table: how it differs from bf16, four heads of 64 in q, k and v, forward and backward.
ROWS: dict[str, dict[str, Any]] = {
    "float16": {"dtype": "fp16"},
    "bfloat16": {"dtype": "bf16"},
    "float32": {"dtype": "fp32"},
    "float64": {"dtype": "fp64"},
    "head dim 40": {"head_dim": 40, "head_dim_v": 40},
    "head dim 128": {"head_dim": 128, "head_dim_v": 128},
    "head dim 256": {"head_dim": 256, "head_dim_v": 256},
    "head dim 512": {"head_dim": 512, "head_dim_v": 512},
    "head dim 192, of v 128": {"head_dim": 192, "head_dim_v": 128},
    "grouped heads (GQA, MQA)": {"heads_k": 2},
    "causal, top-left": {"causal": "top_left"},
    "causal, bottom-right": {"causal": "bottom_right"},
    "bool mask, any broadcast": {"mask": True},
    "additive bias with its gradient": {"bias": True},
    "dropout": {"dropout_p": 0.1},
    "forward without gradient": {"requires_grad": False},
}


def ask(backend: str, device: str, change: dict[str, Any]) -> str:
    """ "" if the backend takes the call, else its reason."""
    import flash_attn

    row = _DEFAULT | {"requires_grad": True} | change
    dtype = _DTYPES[row["dtype"]]

    def tensor(*shape: int) -> torch.Tensor:
        made = torch.zeros(shape, dtype=dtype, device=device)
        return made.requires_grad_(row["requires_grad"])

    q = tensor(1, 4, 16, row["head_dim"])
    k = tensor(1, row["heads_k"], 16, row["head_dim"])
    v = tensor(1, row["heads_k"], 16, row["head_dim_v"])
    possible, reason = flash_attn.can_use(
        q,
        k,
        v,
        bias=tensor(1, 4, 16, 16) if row.get("bias") else None,
        mask=torch.ones(1, 1, 1, 16, dtype=torch.bool, device=device) if row.get("mask") else None,
        causal=row.get("causal"),
        dropout_p=row.get("dropout_p", 0.0),
        backend=backend,
    )
    return "" if possible else reason


def backend_devices() -> dict[str, str]:
    """{backend: device} of the backends that were compiled in and whose device is here."""
    from flash_attn import _C

    devices = {name: "cpu" if name == "cpu" else "cuda" for name in _C.backends()}
    if not torch.cuda.is_available():
        devices = {name: device for name, device in devices.items() if device == "cpu"}
    return devices


def collect() -> dict[str, Any]:
    """{backend: {device, rows: {row: reason, "" if it can}}}."""
    return {
        backend: {
            "device": torch.cuda.get_device_name() if device == "cuda" else "any CPU",
            "rows": {row: ask(backend, device, change) for row, change in ROWS.items()},
        }
        for backend, device in backend_devices().items()
    }


def support_table(recorded: dict[str, Any]) -> str:
    """Markdown: a row a feature, a column a backend; reasons below, numbered."""
    backends = recorded["backends"]
    header = ["forward and backward", *(f"`{name}`" for name in backends)]
    reasons: list[str] = []
    lines = []
    for row in ROWS:
        cells = [row]
        for found in backends.values():
            reason = found["rows"].get(row)
            if reason is None:
                cells.append("?")
            elif reason == "":
                cells.append("yes")
            else:
                if reason not in reasons:
                    reasons.append(reason)
                cells.append(f"no [{reasons.index(reason) + 1}]")
        lines.append(cells)
    rule = ["---"] + [":---:"] * len(backends)
    table = "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])
    asked = "; ".join(f"`{name}` on {found['device']}" for name, found in backends.items())
    notes = "\n".join(f"{i}. {reason}" for i, reason in enumerate(reasons, start=1))
    return "\n\n".join(part for part in (table, notes, f"Asked of `can_use`: {asked}.") if part)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.support", description=__doc__)
    parser.add_argument("--output", type=Path, default=SUPPORT_JSON)
    arguments = parser.parse_args(argv)
    known = json.loads(SUPPORT_JSON.read_text())["backends"] if SUPPORT_JSON.exists() else {}
    recorded = {"backends": known | collect()}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(recorded, indent=1) + "\n")
    print(support_table(recorded))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
