# SPDX-License-Identifier: BSD-3-Clause
"""Finds a CUDA toolkit, and the architectures to compile for."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ARCHS = ["8.0+PTX", "9.0a"]
NAMED_ARCHS = {
    "Turing": "7.5",
    "Ampere": "8.0 8.6",
    "Ada": "8.9",
    "Hopper": "9.0a",
    "Blackwell": "10.0 12.0",
}


class BuildError(Exception):
    """A build that cannot be done, with a message for whoever asked for it."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that can compile: nvcc, the headers and libcudart."""

    root: Path
    nvcc: Path
    include: Path
    cudart: Path
    version: str


def _home_of_nvcc() -> Path | None:
    """Where nvcc says it lives; a script or a link on PATH may stand anywhere."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    found = re.search(r"_HERE_=(\S+)", dry_run.stdout + dry_run.stderr)
    return Path(found.group(1)).parent if found else Path(nvcc).resolve().parent.parent


def _toolkit_places() -> list[tuple[str, Path | None]]:
    places: list[tuple[str, Path | None]] = [
        (name, Path(os.environ[name]) if os.environ.get(name) else None)
        for name in ("CUDA_HOME", "CUDA_PATH")
    ]
    places += [("nvcc on PATH", _home_of_nvcc()), ("default prefix", Path("/usr/local/cuda"))]
    wheels = importlib.util.find_spec("nvidia")
    for folder in wheels.submodule_search_locations or [] if wheels else []:
        places += [("nvidia wheels", path) for path in sorted(Path(folder).glob("cu[0-9]*"))]
    return places


def _toolkit_at(root: Path) -> Toolkit | str:
    """The toolkit at `root`, or what is missing there."""
    if not root.is_dir():
        return "no such folder"
    targets = sorted(root.glob("targets/*"))
    headers = [root / "include", *(target / "include" for target in targets)]
    libraries = [root / "lib64", root / "lib", *(target / "lib" for target in targets)]
    nvcc = root / "bin" / "nvcc"
    include = next((path for path in headers if (path / "cuda_runtime.h").is_file()), None)
    cudart = next((so for path in libraries for so in sorted(path.glob("libcudart.so*"))), None)
    missing = [
        what
        for what, there in (
            ("bin/nvcc", os.access(nvcc, os.X_OK)),
            ("cuda_runtime.h", include),
            ("libcudart.so", cudart),
        )
        if not there
    ]
    if missing or include is None or cudart is None:
        return "no " + ", no ".join(missing)
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", answer)
    if found is None:
        return "nvcc does not run"
    return Toolkit(root, nvcc, include, cudart, found.group(1))


def find_toolkit() -> Toolkit:
    """The first usable toolkit, or a BuildError that names every place looked at."""
    report = []
    for name, root in _toolkit_places():
        found = "not set or not found" if root is None else _toolkit_at(root)
        if isinstance(found, Toolkit):
            return found
        report.append(f"  {name}{f' ({root})' if root else ''}: {found}")
    raise BuildError("no CUDA toolkit found; looked at\n" + "\n".join(report))


def visible_gpu_archs() -> list[str]:
    """Architectures of the GPUs of this machine, as the driver's tool reports them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    found = sorted(set(re.findall(r"^(\d+\.\d+)\s*$", answer.stdout, re.MULTILINE)))
    return ["9.0a" if arch == "9.0" else arch for arch in found]


def cuda_archs() -> tuple[list[str], str]:
    """Architectures to compile for, and why these."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ")
    for name, archs in NAMED_ARCHS.items():
        listed = re.sub(rf"\b{name}\b", archs, listed)
    if listed.split():
        return listed.split(), "TORCH_CUDA_ARCH_LIST"
    visible = visible_gpu_archs()
    if visible:
        return visible, "the visible GPUs"
    return DEFAULT_ARCHS, "default: no GPU is visible and TORCH_CUDA_ARCH_LIST is not set"


def gencode_flags(archs: list[str]) -> str:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        codes = [f"sm_{number}"] + [f"compute_{number}"] * arch.endswith("+PTX")
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return " ".join(flags)
