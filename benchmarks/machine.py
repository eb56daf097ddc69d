# SPDX-License-Identifier: BSD-3-Clause
"""What a figure was measured on: device, versions, commit; peak rate and peak memory of it."""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def _command(*argv: str) -> str | None:
    try:
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    name = found.group(1).strip() if found else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    """The revision of the tree, with + if the sources differ from it; BENCH_COMMIT without git."""
    revision = _command("git", "rev-parse", "--short=10", "HEAD")
    if revision is None:
        return os.environ.get("BENCH_COMMIT", "unknown")
    sources = ("csrc", "flash_attn", "setup.py")
    dirty = _command("git", "status", "--porcelain", "--untracked-files=no", "--", *sources)
    return revision + ("+" if dirty else "")


def build() -> dict[str, Any]:
    """What flash_attn.build_info says, as JSON holds it."""
    import flash_attn

    facts: dict[str, Any] = json.loads(json.dumps(flash_attn.build_info(), default=str))
    return facts


def describe(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "device_type": device.type,
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = properties.name
        facts["memory_bytes"] = properties.total_memory
        facts["multiprocessors"] = properties.multi_processor_count
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["driver"] = _command(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    return facts


def gpu_state() -> dict[str, str] | None:
    """SM clock, power and temperature now: a figure without its clock says little."""
    line = _command(
        "nvidia-smi",
        "--query-gpu=clocks.sm,power.draw,temperature.gpu",
        "--format=csv,noheader,nounits",
    )
    if not line:
        return None
    clock, power, temperature = (part.strip() for part in line.splitlines()[0].split(","))
    return {"sm_mhz": clock, "watt": power, "celsius": temperature}


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of torch's own matrix product, the ceiling that attention is compared with."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    torch.mm(a, b)
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        synchronize(device)
        begin = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        times.append(time.perf_counter() - begin)
    times.sort()
    return 2.0 * size**3 / times[len(times) // 2]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def available_bytes(device: torch.device) -> int:
    """Memory that a rival may ask for before it is refused for asking too much."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found.group(1)) * 1024 if found else 4 << 30


class PeakMemory:
    """Bytes that the block needed at most beyond what was there before it; None if unknown.

    CUDA: the caching allocator's own high-water mark. CPU: the resident set's high-water mark,
    which Linux lets a process reset; freed pages go back to the system first.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._before = self._reset_resident_peak()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        elif self._before is not None:
            peak = _status_bytes("VmHWM")
            self.bytes = None if peak is None else max(0, peak - self._before)

    @staticmethod
    def _reset_resident_peak() -> int | None:
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError):
            return None
        return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int | None:
    try:
        found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None
