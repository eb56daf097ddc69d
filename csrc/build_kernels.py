# SPDX-License-Identifier: BSD-3-Clause
"""Builds everything below csrc/ops: the kernels and their C++ tests, without torch.

setup.py links the objects into flash_attn._C; `make kernels` and `make test-cpp` run this file:

    python csrc/build_kernels.py objects [--cuda]    compile the backends
    python csrc/build_kernels.py kernels             compile the CUDA backend, fail on spills
    python csrc/build_kernels.py tests [--cuda]      compile and run the C++ tests

One ninja file describes all of it. Sources are found by their place and name: an object of
csrc/cpu/instances gets the flags of the instruction set its name ends with, csrc/cuda/**/*.cu goes
to nvcc with the architectures of its name's prefix, and a header that changed rebuilds what reads
it.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cuda_toolkit import BuildError, Toolkit, cuda_archs, find_toolkit, gencode_flags

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "kernels"

CXX_FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wempty-body -Icsrc"
CPU_FLAGS = "-ffp-contract=off"
ISA_FLAGS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": (
        "-mavx2 -mfma -mf16c -mavx512f -mavx512dq -mavx512bw -mavx512vl -mprefer-vector-width=512"
    ),
}
ISA_FLAGS["avx512_bf16"] = ISA_FLAGS["avx512"] + " -mavx512bf16"
ISA_FLAGS["amx"] = ISA_FLAGS["avx512_bf16"] + " -mamx-tile -mamx-bf16"
NVCC_FLAGS = (
    "-std=c++20 -O3 --expt-relaxed-constexpr -Icsrc"
    " -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"
    " -Xptxas -v,--warn-on-spills,--warn-on-local-memory-usage"
)
if os.environ.get("FLASH_ATTN_SANITIZE") == "1":  # `make sanitize`
    NVCC_FLAGS += " -DFLASH_SANITIZE"
GIB_PER_NVCC = 2.5  # peak of one nvcc process on the largest instance


# ---------------------------------------------------------------------------------- what to build


@dataclass
class Plan:
    """Objects by backend, tests, and the ninja statements that make them."""

    toolkit: Toolkit | None
    archs: list[str]
    cpu_objects: list[Path] = field(default_factory=list)
    cuda_objects: list[Path] = field(default_factory=list)
    kernel_objects: list[Path] = field(default_factory=list)  # those of nvcc
    tests: list[Path] = field(default_factory=list)
    statements: list[str] = field(default_factory=list)

    def objects(self) -> list[Path]:
        return self.cpu_objects + self.cuda_objects

    def add(self, output: Path, rule: str, inputs: list[Path], **variables: str) -> Path:
        named = " ".join(str(path.relative_to(ROOT)) for path in inputs)
        self.statements.append(f"build {output.relative_to(ROOT)}: {rule} {named}")
        self.statements += [f"  {name} = {value}" for name, value in variables.items()]
        return output


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64", "i686", "i386")


def isa_of(source: Path) -> str | None:
    return next((isa for isa in ISA_FLAGS if source.stem.endswith("_" + isa)), None)


def _object_path(source: Path, suffix: str = ".o") -> Path:
    name = source.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return BUILD / (name.removeprefix("csrc.") + suffix)


def _add_cpu(plan: Plan) -> None:
    for source in sorted((ROOT / "csrc/cpu").rglob("*.cpp")):
        isa = isa_of(source)
        if isa not in (None, "portable") and not is_x86():
            continue
        flags = f"{CXX_FLAGS} {CPU_FLAGS} {ISA_FLAGS[isa or 'portable']}"
        plan.cpu_objects.append(plan.add(_object_path(source), "cxx", [source], flags=flags))


def _archs_of(source: Path, archs: list[str]) -> list[str]:
    """sm90_* uses instructions that exist under 9.0a alone; the rest is for every architecture."""
    return ["9.0a"] if source.stem.startswith("sm90") else archs


def _add_cuda(plan: Plan, toolkit: Toolkit) -> None:
    for source in sorted((ROOT / "csrc/cuda").rglob("*.cpp")):
        flags = f"{CXX_FLAGS} -isystem {toolkit.include}"
        plan.cuda_objects.append(plan.add(_object_path(source), "cxx", [source], flags=flags))
    for source in sorted((ROOT / "csrc/cuda").rglob("*.cu")):
        flags = f"{NVCC_FLAGS} {gencode_flags(_archs_of(source, plan.archs))}"
        made = plan.add(_object_path(source), "nvcc", [source], flags=flags)
        plan.cuda_objects.append(made)
        plan.kernel_objects.append(made)


def _add_tests(plan: Plan) -> None:
    """tests/csrc/X/*_test.cpp are programs, linked to the objects of backend X. A test named
    *_isa_test.cpp is compiled once per instruction set and number type and links to nothing; one
    named *_host_test.cpp uses nothing of the CUDA Toolkit."""
    base = f"{CXX_FLAGS} -Itests/csrc -pthread"
    archives = (
        {"cpu": plan.add(BUILD / "cpu.a", "ar", plan.cpu_objects)} if plan.cpu_objects else {}
    )
    if plan.cuda_objects:
        archives["cuda"] = plan.add(BUILD / "cuda.a", "ar", plan.cuda_objects)
    for source in sorted((ROOT / "tests/csrc").rglob("*_test.cpp")):
        layer = source.relative_to(ROOT / "tests/csrc").parts[0]
        if source.name.endswith("_isa_test.cpp"):
            for isa in ISA_FLAGS if is_x86() else ["portable"]:
                for real in ("float", "double"):
                    plan.tests.append(
                        plan.add(
                            _object_path(source, f".{isa}.{real}"),
                            "program",
                            [source],
                            flags=f"{base} {CPU_FLAGS} {ISA_FLAGS[isa]} -DFLASH_CPU_REAL={real}",
                        )
                    )
            continue
        needs_toolkit = layer == "cuda" and not source.name.endswith("_host_test.cpp")
        if needs_toolkit and plan.toolkit is None:
            print(f"skipped, needs --cuda and a GPU: {source.relative_to(ROOT)}")
            continue
        flags, libraries = base, ""
        if layer == "cuda" and plan.toolkit is not None:
            flags += f" -isystem {plan.toolkit.include}"
            libraries = f"{plan.toolkit.cudart} -Wl,-rpath,{plan.toolkit.cudart.parent}"
        inputs = [source, *(archives[name] for name in archives if name == layer)]
        plan.tests.append(
            plan.add(_object_path(source, ""), "program", inputs, flags=flags, libs=libraries)
        )


RULES = """
rule cxx
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out > $out.log 2>&1; s=$$?; cat $out.log; $
      exit $$s
  description = C++ $in
  depfile = $out.d
  deps = gcc
rule nvcc
  command = $nvcc $flags -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)
  description = CUDA $in
  depfile = $out.d
  deps = gcc
rule ar
  command = rm -f $out && ar rcs $out $in
rule program
  command = $cxx $flags -MMD -MF $out.d $in -o $out $libs
  description = C++ test $out
  depfile = $out.d
  deps = gcc
"""


def make_plan(toolkit: Toolkit | None, archs: list[str], with_tests: bool = False) -> Plan:
    plan = Plan(toolkit, archs)
    _add_cpu(plan)
    if toolkit is not None:
        _add_cuda(plan, toolkit)
    if with_tests:
        _add_tests(plan)
    return plan


# ---------------------------------------------------------------------------------- building it


def max_jobs(with_cuda: bool) -> int:
    """MAX_JOBS, else as many compilers as the cores and the free memory allow."""
    if os.environ.get("MAX_JOBS", "").isdigit():
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        meminfo = Path("/proc/meminfo").read_text()
        free_gib = int(re.search(r"MemAvailable:\s+(\d+)", meminfo).group(1)) / 2**20  # type: ignore[union-attr]
    except (OSError, AttributeError):
        return cores
    return max(1, min(cores, int(free_gib / (GIB_PER_NVCC if with_cuda else 1.0))))


@contextmanager
def build_lock() -> Iterator[None]:
    """One build at a time in this tree."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ninja_program() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
    if found is None:
        raise BuildError("ninja is missing: pip install ninja")
    return found


def run_ninja(plan: Plan, targets: list[Path]) -> float:
    """Makes the targets; returns the seconds it took."""
    BUILD.mkdir(parents=True, exist_ok=True)
    compilers = [f"cxx = {os.environ.get('CXX', 'g++')}"]
    if plan.toolkit is not None:
        host = f" -ccbin {os.environ['CXX']}" if os.environ.get("CXX") else ""
        threads = os.environ.get("NVCC_THREADS", "1")
        compilers.append(f"nvcc = {plan.toolkit.nvcc}{host} --threads {threads}")
    ninja_file = BUILD / "build.ninja"
    head = ["ninja_required_version = 1.3", f"builddir = {BUILD.relative_to(ROOT)}", *compilers]
    ninja_file.write_text("\n".join([*head, RULES, *plan.statements, ""]))
    jobs = max_jobs(plan.toolkit is not None)
    started = time.monotonic()
    command = [ninja_program(), "-C", str(ROOT), "-f", str(ninja_file), "-j", str(jobs)]
    status = subprocess.run(command + [str(path.relative_to(ROOT)) for path in targets]).returncode
    if status != 0:
        raise BuildError("compilation failed; the compiler's message stands above")
    return time.monotonic() - started


# ---------------------------------------------------------------------------------- looking at it


@dataclass(frozen=True)
class Kernel:
    """One line of ptxas' report."""

    name: str
    arch: str
    registers: int
    spill_bytes: int


def kernels_of(objects: list[Path]) -> list[Kernel]:
    """What ptxas said about every kernel, from the logs of the last compilation."""
    entry = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    return [
        Kernel(name, arch, int(registers), int(stores) + int(loads))
        for path in objects
        for name, arch, stores, loads, registers in entry.findall(
            Path(f"{path}.log").read_text() if Path(f"{path}.log").exists() else ""
        )
    ]


def count_kernels(objects: list[Path]) -> int:
    return len({kernel.name for kernel in kernels_of(objects)})


def _allowed_spills() -> list[tuple[str, int, str]]:
    """csrc/cuda/allowed_spills.txt: pattern, most bytes, reason; one kernel family a line."""
    allow_list = ROOT / "csrc/cuda/allowed_spills.txt"
    lines = allow_list.read_text().splitlines() if allow_list.exists() else []
    rows = [line.split(None, 2) for line in lines if line.strip() and not line.startswith("#")]
    for row in rows:
        if len(row) != 3:
            raise BuildError(f"{allow_list.name}: expected PATTERN BYTES REASON, got {row}")
    return [(pattern, int(most), reason) for pattern, most, reason in rows]


def spill_gate(plan: Plan) -> None:
    """Fails on a spilling kernel that the allow-list does not explain, and on nvcc warnings."""
    kernels = kernels_of(plan.kernel_objects)
    allowed = _allowed_spills()
    bad = []
    for kernel in kernels:
        most = max(
            (most for pattern, most, _ in allowed if re.search(pattern, kernel.name)), default=0
        )
        if kernel.spill_bytes > most:
            bad.append(
                f"{kernel.name} ({kernel.arch}): spills {kernel.spill_bytes} bytes, allowed {most}"
            )
    for path in plan.kernel_objects:
        for line in Path(f"{path}.log").read_text().splitlines():
            if (
                "warning" in line
                and "spill" not in line.lower()
                and "local memory" not in line.lower()
            ):
                bad.append(f"{path.name}: {line.strip()}")
    spilling = sum(kernel.spill_bytes > 0 for kernel in kernels)
    print(f"{len(kernels)} kernels, {spilling} with spills, {len(bad)} complaints")
    if bad:
        raise BuildError("\n".join(bad))


def _machine_runs(test: Path) -> bool:
    flags = {
        "avx2": "avx2",
        "avx512": "avx512vl",
        "avx512_bf16": "avx512_bf16",
        "amx": "amx_bf16",
    }
    needed = next((flag for isa, flag in flags.items() if f".{isa}." in test.name), "")
    return not needed or needed in Path("/proc/cpuinfo").read_text()


def run_tests(plan: Plan) -> None:
    linkage = ROOT / "tests/csrc/cpu/linkage.sh"
    checks: list[list[str]] = []
    if linkage.exists():
        isa_objects = [str(path) for path in plan.cpu_objects if isa_of(path)]
        checks.append(["sh", str(linkage), *isa_objects])
    checks += [[str(test)] for test in plan.tests if _machine_runs(test)]
    failed = []
    for check in checks:
        name = Path(check[1] if check[0] == "sh" else check[0]).name
        started = time.monotonic()
        status = subprocess.run(check, cwd=ROOT).returncode
        print(
            f"{'ok' if status == 0 else 'FAILED'}  {name}  {time.monotonic() - started:.1f} s",
            flush=True,
        )
        if status != 0:
            failed.append(name)
    print(f"C++ tests: {len(checks) - len(failed)} passed, {len(failed)} failed")
    if failed:
        raise BuildError("failed: " + ", ".join(failed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("what", choices=["objects", "kernels", "tests"])
    parser.add_argument("--cuda", action="store_true", help="the CUDA backend too")
    arguments = parser.parse_args()
    try:
        wants_cuda = arguments.cuda or arguments.what == "kernels"
        toolkit = find_toolkit() if wants_cuda else None
        archs, why = cuda_archs()
        if toolkit:
            print(
                f"CUDA {toolkit.version} at {toolkit.root}, architectures {' '.join(archs)} ({why})"
            )
        plan = make_plan(toolkit, archs, with_tests=arguments.what == "tests")
        with build_lock():
            targets = {
                "objects": plan.objects(),
                "kernels": plan.cuda_objects,
                "tests": plan.cpu_objects + plan.tests,
            }[arguments.what]
            seconds = run_ninja(plan, targets)
            print(f"built in {seconds:.0f} s with {max_jobs(toolkit is not None)} jobs", flush=True)
            if arguments.what == "kernels":
                spill_gate(plan)
            if arguments.what == "tests":
                run_tests(plan)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
