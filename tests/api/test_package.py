# SPDX-License-Identifier: BSD-3-Clause
"""What the package says about itself, and what it says where it cannot load."""

import importlib.metadata
import inspect
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

import flash_attn

PACKAGE = pathlib.Path(flash_attn.__file__).parent


def test_version():
    assert flash_attn.__version__ == "2.8.3"
    assert [int(part) for part in flash_attn.__version__.split(".")] == [2, 8, 3]


def test_metadata_agrees():
    try:
        installed = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("built in place, not installed")
    assert installed == flash_attn.__version__


def test_build_info():
    info = flash_attn.build_info()
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"name", "source_revision", "cuda", "cuda_archs", "cxx_standard"} <= info.keys()
    assert "cpu" in flash_attn._C.backends()


def test_public_names():
    for name in flash_attn.__all__:
        thing = getattr(flash_attn, name)
        assert name == "__version__" or inspect.getdoc(thing), name
    for name in ("scaled_dot_product_attention", "attention", "flash_attn_func", "can_use",
                 "flash_attn_varlen_func", "sdpa_patch", "use_backend", "use_cpu_isa", "nn",
                 "build_info"):  # fmt: skip
        assert name in flash_attn.__all__
    assert (PACKAGE / "py.typed").exists()


def test_main():
    result = subprocess.run(
        [sys.executable, "-m", "flash_attn"], capture_output=True, text=True, check=False,
        cwd=PACKAGE.parent,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    text = result.stdout
    assert "2.8.3" in text and torch.__version__ in text
    assert re.search(r"cpu +float32 +yes", text) and "avx" in text + "avx on x86 only"
    if not torch.cuda.is_available():
        assert re.search(r"GPU", text)


def import_a_copy(tmp_path, change):
    """Imports a copy of the package, changed, in a process of its own; returns what it says."""
    copy = tmp_path / "flash_attn"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    change(copy)
    # An editable install of the package would lend the copy what it lacks: its path is extended.
    program = (
        "import sys\n"
        f"sys.path = [p for p in sys.path if p != {str(PACKAGE.parent)!r}]\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in f.__module__]\n"
        "import flash_attn"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False,
        cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    return result.returncode, result.stderr.strip().splitlines()[-1] if result.stderr else ""


def test_without_extension(tmp_path):
    def remove(copy):
        for path in [*copy.glob("_C*"), copy / "_build_info.py"]:
            path.unlink()

    code, text = import_a_copy(tmp_path, remove)
    assert code != 0 and text.startswith("ImportError: ") and "pip install" in text


def test_built_for_another_torch(tmp_path):
    def pretend(copy):
        path = copy / "_build_info.py"
        path.write_text(path.read_text().replace(torch.__version__, "1.13.1"))

    code, text = import_a_copy(tmp_path, pretend)
    found = ".".join(torch.__version__.split(".")[:2])
    assert code != 0 and "built for torch 1.13" in text and f"found torch {found}" in text


def test_built_for_another_cuda(tmp_path):
    def pretend(copy):
        with (copy / "_build_info.py").open("a") as file:
            file.write("INFO['cuda'] = '99.1'\n")

    code, text = import_a_copy(tmp_path, pretend)
    assert code != 0 and text.startswith("ImportError: ") and "CUDA 99" in text


def test_import_asks_nothing_of_the_network_and_no_other_package():
    program = (
        "import sys, socket\n"
        "import torch\n"
        "before = set(sys.modules)\n"
        "socket.socket.connect = lambda *a: sys.exit('connects')\n"
        "import flash_attn\n"
        "tops = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(tops - set(sys.stdlib_module_names) - {'flash_attn', 'torch'}))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False,
        cwd=PACKAGE.parent,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""


def test_signature_is_that_of_torch():
    """Names, order, defaults and kinds."""
    parameters = inspect.signature(flash_attn.scaled_dot_product_attention).parameters
    got = [(p.name, p.kind.name, p.default) for p in parameters.values()]
    positional, keyword, empty = "POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY", inspect.Parameter.empty
    assert got == [
        ("query", positional, empty), ("key", positional, empty), ("value", positional, empty),
        ("attn_mask", positional, None), ("dropout_p", positional, 0.0),
        ("is_causal", positional, False), ("scale", keyword, None), ("enable_gqa", keyword, False),
    ]  # fmt: skip
    assert flash_attn.scaled_dot_product_attention.__name__ == "scaled_dot_product_attention"
