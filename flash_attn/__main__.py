# SPDX-License-Identifier: BSD-3-Clause
"""`python -m flash_attn`: what this build is, and what this machine can run."""

from __future__ import annotations

import sys

import torch

from . import __version__, build_info
from ._ops import _C, why_unsupported

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _device_of(backend: str) -> str:
    return "cpu" if backend == "cpu" else "cuda"


def _verdict(backend: str, dtype: torch.dtype) -> str:
    """Whether the backend takes an ordinary call here, forward and backward."""
    device = _device_of(backend)
    if device == "cuda" and not torch.cuda.is_available():
        return "no: torch sees no GPU"
    q = torch.empty(1, 1, 16, 64, device=device, dtype=dtype)
    reasons = why_unsupported(q, q, q, backend=backend, backward=True)
    return "no: " + "; ".join(reasons) if reasons else "yes"


def main() -> int:
    print(f"flash_attn {__version__} (FlashAttention-2 API level)")
    for name, value in build_info().items():
        print(f"  {name}: {value}")
    print(f"CPU instruction set: {_C.cpu_isa()} of {', '.join(_C.available_isas())}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"GPUs: {', '.join(gpus) or 'none that torch sees'}")
    if all(_device_of(name) == "cpu" for name in _C.backends()):
        print(f"CUDA backends: none in this build ({build_info()['why_cuda']})")
    for backend in _C.backends():
        for dtype in DTYPES:
            print(f"  {backend:5} {str(dtype).removeprefix('torch.'):9} {_verdict(backend, dtype)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
