# SPDX-License-Identifier: BSD-3-Clause
"""Builds flash_attn._C. The kernels come from csrc/build_kernels.py, which knows no torch; torch's
BuildExtension compiles csrc/ops and links the two.

FLASH_ATTN_CUDA=auto (default) builds the CUDA backend where torch has CUDA and a toolkit is found,
0 never, 1 or fails. No GPU has to be visible.
"""

import os
import pprint
import subprocess
import sys
import time
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

import build_kernels  # noqa: E402
import cuda_toolkit  # noqa: E402
from cuda_toolkit import BuildError, Toolkit  # noqa: E402

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        "flash-attn is compiled against the torch it will run with, and torch cannot be imported: "
        f"{error}.\nInstall torch 2.11 or newer, then: pip install --no-build-isolation ."
    ) from None

OPS_FLAGS = [
    *("-std=c++20", "-O2", "-g0", "-fopenmp", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers"),
]


def say(text: str) -> None:
    print(f"flash-attn: {text}", flush=True)


def choose_toolkit() -> tuple[Toolkit | None, str]:
    """The toolkit to build the CUDA backend with, or None, and why."""
    wanted = os.environ.get("FLASH_ATTN_CUDA", "auto").lower() or "auto"
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"FLASH_ATTN_CUDA: expected auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None, "FLASH_ATTN_CUDA=0"
    try:
        if torch.version.cuda is None:
            raise BuildError(f"torch {torch.__version__} is a build without CUDA")
        toolkit = cuda_toolkit.find_toolkit()
        if toolkit.version.split(".")[0] != torch.version.cuda.split(".")[0]:
            raise BuildError(
                f"the toolkit at {toolkit.root} is CUDA {toolkit.version}, torch was built with "
                f"CUDA {torch.version.cuda}: the major versions must agree"
            )
    except BuildError as error:
        if wanted == "1":
            raise SystemExit(
                f"FLASH_ATTN_CUDA=1, but the CUDA backend cannot be built: {error}"
            ) from None
        return None, str(error)
    return toolkit, f"CUDA {toolkit.version} at {toolkit.root}, torch has CUDA {torch.version.cuda}"


def source_revision() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def extension(toolkit: Toolkit | None) -> Extension:
    absent = "cuda_keys.cpp" if toolkit is None else "cuda_absent.cpp"
    sources = sorted(path for path in (ROOT / "csrc/ops").glob("*.cpp") if path.name != absent)
    includes = cpp_extension.include_paths() + ([str(toolkit.include)] if toolkit else [])
    system = [flag for path in includes for flag in ("-isystem", path)]
    links: list[str] = []
    libraries = ["c10", "torch", "torch_cpu", "torch_python"]
    if toolkit:
        libraries += ["c10_cuda", "torch_cuda"]
        links.append(str(toolkit.cudart))
    return Extension(
        "flash_attn._C",
        [str(path.relative_to(ROOT)) for path in sources],
        include_dirs=[str(ROOT / "csrc")],
        library_dirs=cpp_extension.library_paths(),
        libraries=libraries,
        extra_compile_args={"cxx": OPS_FLAGS + system},
        extra_link_args=links,
        language="c++",
    )


class BuildKernelsAndOps(cpp_extension.BuildExtension):
    """The kernels first, then csrc/ops; both are incremental, linking is done anew."""

    def finalize_options(self) -> None:
        super().finalize_options()
        tag = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
        self.build_temp = str(ROOT / "build" / f"ops-{tag}-{'cuda' if TOOLKIT else 'cpu'}")
        self.force = True

    def run(self) -> None:
        os.environ["PATH"] = f"{Path(build_kernels.ninja_program()).parent}:{os.environ['PATH']}"
        os.environ["MAX_JOBS"] = str(build_kernels.max_jobs(TOOLKIT is not None))
        archs, why_archs = cuda_toolkit.cuda_archs()
        plan = build_kernels.make_plan(TOOLKIT, archs)
        say(f"CUDA backend: {'yes' if TOOLKIT else 'no'} ({WHY})")
        if TOOLKIT:
            say(f"architectures: {' '.join(archs)} ({why_archs})")
        say(f"{len(plan.objects())} kernel objects, {os.environ['MAX_JOBS']} jobs")
        with build_kernels.build_lock():
            seconds = build_kernels.run_ninja(plan, plan.objects())
            kernels = build_kernels.count_kernels(plan.kernel_objects)
            say(f"kernels: {seconds:.0f} s" + (f", {kernels} CUDA kernels" if TOOLKIT else ""))
            started = time.monotonic()
            self.extensions[0].extra_objects = [str(path) for path in plan.objects()]
            super().run()
            say(f"operators: {time.monotonic() - started:.0f} s")
            self.write_build_info(archs if TOOLKIT else [], kernels)

    def write_build_info(self, archs: list[str], kernels: int) -> None:
        info = {
            "name": "flash-attn (exact attention for PyTorch, FlashAttention-2 API level 2.8.3)",
            "source_revision": source_revision(),
            "torch": torch.__version__,
            "cuda": TOOLKIT.version if TOOLKIT else None,
            "cuda_archs": archs,
            "cuda_kernels": kernels,
            "cxx_standard": "c++20",
            "cxx11_abi": bool(torch.compiled_with_cxx11_abi()),
            "python": sys.version.split()[0],
            "why_cuda": WHY.splitlines()[0],
        }
        folder = Path(self.get_ext_fullpath("flash_attn._C")).parent
        text = (
            '"""Written by the build."""\n\nfrom typing import Any\n\n'
            f"INFO: dict[str, Any] = {pprint.pformat(info, sort_dicts=False)}\n"
        )
        (folder / "_build_info.py").write_text(text)


TOOLKIT, WHY = choose_toolkit()
try:
    setup(ext_modules=[extension(TOOLKIT)], cmdclass={"build_ext": BuildKernelsAndOps})
except BuildError as error:
    raise SystemExit(f"flash-attn: {error}") from None
