# SPDX-License-Identifier: BSD-3-Clause
"""Every case of the grid once on sm90, forward and both backwards, for compute-sanitizer:
`make sanitize` or `compute-sanitizer --tool memcheck python tests/sanitize.py [case ...]`."""

import sys
from collections import Counter

import pytest
import torch
from cases import GRID
from conftest import Backend
from inputs import make_inputs
from numerics import run


def main(names: list[str]) -> int:
    backend, outcomes = Backend("sm90"), Counter()
    for case, dtype in GRID:
        if dtype != "bfloat16" or (names and case.name not in names):
            continue
        try:
            inputs = make_inputs(case, dtype, "cuda")
            for deterministic in (True, False):
                run(backend.attention, inputs, deterministic=deterministic)
            torch.cuda.synchronize()
            outcomes["ran"] += 1
        except pytest.skip.Exception:
            outcomes["not for sm90"] += 1
    print(dict(outcomes))
    return 0 if outcomes["ran"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
