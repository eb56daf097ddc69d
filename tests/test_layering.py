# SPDX-License-Identifier: BSD-3-Clause
"""The rules of the source tree that a script can read off the text.

csrc/ has layers, and each may include only those below it; files, functions and template lists
have a largest size; some calls, names and comments do not occur. Every rule is also tried on a
small made-up tree that breaks it, so a rule that stops seeing anything fails as well.
"""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
CXX_SUFFIXES = {".h", ".cuh", ".cpp", ".cu"}
PYTHON_FOLDERS = ("flash_attn", "tests", "benchmarks", "examples")

MAY_INCLUDE = {
    "primitives": {"primitives"},
    "attention": {"attention"},
    "cpu": {"cpu", "attention"},
    "cuda": {"cuda", "attention", "primitives"},
    "ops": {"ops", "attention", "cpu/backend.h", "cuda/backend.h"},
}
TORCH = {"torch", "ATen", "c10", "pybind11", "Python.h"}
CUDA_RUNTIME = re.compile(r"^(cuda|cuda_\w+|driver_types|device_launch\w*|mma)(\.h|/.*)$")

MAX_FILE_LINES = 400
MAX_OPS_FUNCTION_LINES = 60
MAX_FUNCTION_LINES = 125  # a body of 120 and its signature
MAX_KERNEL_TEMPLATE_PARAMETERS = 4
MAX_CUDA_INSTANCES = 40

VAGUE_NAME = re.compile(r"(^|_)(utils?|misc|helpers?|v\d|new|old|opt|fast)(_|\.|$)")
BELOW_OPS = {"primitives", "attention", "cpu", "cuda"}
FORBIDDEN_CALLS = re.compile(
    r"\b(exit|abort|printf|fprintf|puts|getenv|setenv|malloc|calloc|realloc|aligned_alloc"
    r"|cudaMalloc\w*|cudaFree\w*|cudaDeviceSynchronize|cudaStreamSynchronize"
    r"|cudaEventSynchronize|assert)\s*\("
)
CONDITIONAL = re.compile(r"\s*#\s*(if|ifdef|ifndef|elif)\b")
CONDITIONAL_ALLOWED = re.compile(r"__CUDACC__|__CUDA_ARCH__|__GNUC__|__clang__|FLASH_")
STATEMENT = re.compile(
    r"^(if|for|while|switch|else|return|const|constexpr|auto|int|float|double|bool|static"
    r"|using|template|#\s*include)\b.*[;{]$"
    r"|^[A-Za-z_][\w:.<>\[\]]*(->\w+)*\([^()]*(\([^()]*\)[^()]*)*\);$"
    r"|^[A-Za-z_][\w.\[\]]* [-+*/|&]?= [^;]*;$"
    r"|^[{}];?$"
)
PYTHON_STATEMENT = re.compile(
    r"^(import \w+(\.\w+)*|from \S+ import .*|(def|class|if|for|while|with|elif) .*:"
    r"|return [\w.(\[]+.*[)\]]|assert \w+.*[=<>].*|[a-z_][\w.]*\(.*\)"
    r"|[a-z_][\w.]* [-+*/]?= \S+.*\))$"
)
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
MACHINE_PATH = re.compile(r"(?<![\w.])/(work|root|home/\w+|mnt/\w+)/")
NOT_A_FUNCTION = re.compile(
    r"^\s*(namespace|struct|class|enum|union|extern|TORCH_LIBRARY|PYBIND11|typedef|#"
    r"|static const(expr)? \w+ \w+\[|constexpr .* = \{|const .* = \{)"
)


def layer_of(relative):
    return relative.parts[0] if len(relative.parts) > 1 else ""


def include_violation(layer, target):
    top = target.split("/")[0]
    if top in TORCH and layer != "ops":
        return f"{target}: torch below ops"
    if top in MAY_INCLUDE and not {top, target} & MAY_INCLUDE[layer]:
        return f"{layer} may not include {target}"
    if layer in {"attention", "cpu"} and CUDA_RUNTIME.match(target):
        return f"{layer} may not include {target}"
    return None


def functions(lines):
    """(first line, last line, header) of every function that the formatter's indentation shows."""
    for end, line in enumerate(lines):
        if not (match := re.match(r"^( {0}| {2})\}", line)):
            continue
        indent = match.group(1)
        for begin in range(end - 1, -1, -1):
            header = lines[begin]
            starts_here = header.startswith(indent) and header[len(indent) :][:1] not in ("", " ")
            if starts_here and not re.match(r"\s*(//|\}|public:|private:|protected:|#)", header):
                break
        else:
            continue
        if not NOT_A_FUNCTION.match(header) and not re.match(r"\s*(if|for|while|do)\b", header):
            yield begin + 1, end + 1, " ".join(lines[begin : begin + 4])


def split_at_top_level(arguments):
    depth, count = 0, 1
    for character in arguments:
        depth += character in "<(["
        depth -= character in ">)]"
        count += character == "," and depth == 0
    return count


def kernel_template_violations(text):
    for match in re.finditer(r"template\s*<([^{};]*?)>\s*(?:extern\s+)?__global__", text):
        if split_at_top_level(match.group(1)) > MAX_KERNEL_TEMPLATE_PARAMETERS:
            line = text.count("\n", 0, match.start()) + 1
            yield (
                line,
                f"a kernel with more than {MAX_KERNEL_TEMPLATE_PARAMETERS} template parameters",
            )


def line_violations(layer, path, number, line):
    stripped = line.strip()
    comment = re.match(r"^//(?!/)\s*(.*)$", stripped)
    if comment and STATEMENT.match(comment.group(1)):
        yield number, "commented-out code"
    code = re.sub(r'"(\\.|[^"\\])*"', '""', line.split("//")[0])
    if layer in BELOW_OPS and FORBIDDEN_CALLS.search(code.replace("static_assert", "")):
        yield number, "forbidden call"
    if re.match(r"\s*#\s*define\s+(?!FLASH_)", line):
        yield number, "macro without the FLASH_ prefix"
    if re.match(r"\s*#\s*define\s+\w*(SWITCH|DISPATCH)", line):
        yield number, "dispatch macro"
    conditional = CONDITIONAL.match(line) and not CONDITIONAL_ALLOWED.search(line)
    if conditional and layer not in {"primitives", "cpu"}:
        yield number, "conditional compilation outside primitives/ and cpu/"
    if path.suffix in {".h", ".cuh"} and re.match(r"\s*using namespace", line):
        yield number, "using namespace in a header"
    if layer == "primitives" and re.search("attention", line, re.IGNORECASE):
        yield number, "the word attention in primitives"
    if layer == "attention" and re.search(r"\bsm_?(75|80|86|89|90|100|120)\b", line):
        yield number, "the name of an architecture in attention"
    include = re.match(r'\s*#\s*include\s+[<"]([^>"]+)', line)
    if include and (problem := include_violation(layer, include.group(1))):
        yield number, problem


def cxx_violations(root, path):
    relative = path.relative_to(root)
    layer, text = layer_of(relative), path.read_text()
    lines = text.splitlines()
    if not (lines and lines[0] == "// SPDX-License-Identifier: BSD-3-Clause"):
        yield 1, "the first line is not the SPDX line"
    if VAGUE_NAME.search(path.name):
        yield 1, "vague file name"
    if path.suffix in {".h", ".cuh"} and not re.search(r"^#pragma once$", text, re.MULTILINE):
        yield 1, "no #pragma once"
    for number, line in enumerate(lines, 1):
        yield from line_violations(layer, path, number, line)
    longest = MAX_OPS_FUNCTION_LINES if layer == "ops" else MAX_FUNCTION_LINES
    for begin, end, _ in functions(lines):
        if end - begin + 1 > longest:
            yield begin, f"a function of {end - begin + 1} lines, at most {longest}"
    yield from kernel_template_violations(text)


def any_text_violations(path):
    shows_what_is_wrong = path.name == pathlib.Path(__file__).name
    lines = path.read_text().splitlines()
    if len(lines) > MAX_FILE_LINES:
        yield 1, f"{len(lines)} lines, at most {MAX_FILE_LINES}"
    for number, line in enumerate(lines, 1):
        if shows_what_is_wrong:
            continue
        if UNFINISHED.search(line):
            yield number, "unfinished work"
        if MACHINE_PATH.search(line):
            yield number, "a path of one machine"


def python_violations(path):
    lines = path.read_text().splitlines()
    head = [line for line in lines[:2] if not line.startswith("#!")]
    if lines and head[:1] != ["# SPDX-License-Identifier: BSD-3-Clause"]:
        yield 1, "the first line is not the SPDX line"
    if VAGUE_NAME.search(path.name):
        yield 1, "vague file name"
    for number, line in enumerate(lines, 1):
        comment = re.match(r"^\s*#\s*(.*)$", line)
        if comment and PYTHON_STATEMENT.match(comment.group(1).strip()):
            yield number, "commented-out code"


def cxx_files(csrc):
    return [p for p in sorted(csrc.rglob("*")) if p.suffix in CXX_SUFFIXES]


def tree_violations(csrc):
    paths = cxx_files(csrc)
    found = [
        f"{p.relative_to(csrc)}:{line}: {problem}"
        for p in paths
        for line, problem in [*cxx_violations(csrc, p), *any_text_violations(p)]
    ]
    instances = [p for p in paths if p.parent == csrc / "cuda" / "instances"]
    if len(instances) > MAX_CUDA_INSTANCES:
        found.append(f"cuda/instances: {len(instances)} files, at most {MAX_CUDA_INSTANCES}")
    return found


def test_sources_keep_the_rules():
    found = tree_violations(ROOT / "csrc")
    assert not found, "\n".join(found)


def test_cxx_tests_keep_the_general_rules():
    found = []
    for path in cxx_files(ROOT / "tests" / "csrc"):
        problems = list(any_text_violations(path))
        if path.read_text().split("\n", 1)[0] != "// SPDX-License-Identifier: BSD-3-Clause":
            problems.append((1, "the first line is not the SPDX line"))
        found += [f"{path.relative_to(ROOT)}:{line}: {problem}" for line, problem in problems]
    assert not found, "\n".join(found)


def test_python_keeps_the_rules():
    paths = [p for f in PYTHON_FOLDERS for p in sorted((ROOT / f).rglob("*.py"))]
    paths += [ROOT / "setup.py"]
    found = [
        f"{p.relative_to(ROOT)}:{line}: {problem}"
        for p in paths
        if p.exists() and p.name != "_build_info.py"
        for line, problem in [*python_violations(p), *any_text_violations(p)]
    ]
    assert not found, "\n".join(found)


def test_reference_imports_nothing_of_ours():
    text = (ROOT / "flash_attn" / "reference.py").read_text()
    assert not re.search(r"^\s*(from|import)\s+(\.|flash_attn)", text, re.MULTILINE)


def test_no_directory_that_tools_take_for_another_package():
    assert not (ROOT / "flash_attn" / "cute").exists()


HEADERS = [p for p in cxx_files(ROOT / "csrc") if p.suffix == ".h"]
BELOW_OPS_HEADERS = [p for p in HEADERS if p.parent.name != "ops"]
OPS_HEADERS = [p for p in HEADERS if p.parent.name == "ops"]


def relative_path(path):
    return str(path.relative_to(ROOT))


def cuda_include():
    nvcc = shutil.which("nvcc")
    roots = [pathlib.Path(nvcc).resolve().parents[1]] if nvcc else []
    roots += [pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    return next((root / "include" for root in roots if (root / "include/cuda.h").exists()), None)


@pytest.mark.parametrize("header", BELOW_OPS_HEADERS, ids=relative_path)
def test_header_compiles_alone(header):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", f"-I{ROOT / 'csrc'}"]
    if layer_of(header.relative_to(ROOT / "csrc")) in {"cuda", "primitives"}:
        if cuda_include() is None:
            pytest.skip("no CUDA toolkit")
        command += ["-isystem", str(cuda_include())]
    result = subprocess.run([*command, str(header)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("header", OPS_HEADERS, ids=relative_path)
def test_header_is_included_first_by_its_source(header):
    """Which shows at each build that it compiles alone; with torch it takes too long here."""
    source = header.with_suffix(".cpp")
    if not source.exists():
        pytest.skip("a header without a source of its own")
    first = re.search(r'^#include "(.*)"$', source.read_text(), re.MULTILINE).group(1)
    assert first == str(header.relative_to(ROOT / "csrc"))


SPDX = "// SPDX-License-Identifier: BSD-3-Clause\n"
HEADER = SPDX + "#pragma once\n"
GOOD = {
    "attention/mask.h": HEADER
    + "#include <cmath>\n// O += P V, one row at a time\nstruct Mask {};\n",
    "cuda/dispatch.cpp": SPDX + '#include "cuda/spec.h"\n#include "attention/mask.h"\n',
    "cpu/forward.cpp": SPDX + '#include "attention/mask.h"\n#if defined(__AVX512F__)\n#endif\n',
    "ops/forward.cpp": SPDX + '#include <ATen/ATen.h>\n#include "cuda/backend.h"\n',
    "cuda/sm80/forward.cuh": HEADER
    + "template <class Traits, class Mod>\n__global__ void f(int x);\n",
    "cpu/x.cpp": SPDX + "void f() {\n" + "  g();\n" * (MAX_OPS_FUNCTION_LINES + 1) + "}\n",
}
LONG_FUNCTION = "void f(int a,\n       int b) {\n" + "  g();\n" * 200 + "}\n"
BAD = {
    "attention/a.h": HEADER + '#include "primitives/ptx/mma.cuh"\n',
    "attention/b.h": HEADER + "#include <torch/extension.h>\n",
    "attention/c.h": HEADER + "#include <cuda_runtime.h>\n",
    "attention/d.h": HEADER + "// faster on sm_90\n",
    "attention/no_pragma.h": SPDX,
    "cpu/a.cpp": SPDX + '#include "cuda/backend.h"\n',
    "cpu/b.cpp": SPDX + 'bool f() { return getenv("X"); }\n',
    "cpu/c.cpp": SPDX + LONG_FUNCTION,
    "cpu/no_spdx.cpp": "int x;\n",
    "cuda/a.cuh": HEADER + "// store(gO, acc);\n",
    "cuda/b.cuh": HEADER
    + "template <int A, int B, bool C, bool D, bool E>\n__global__ void f();\n",
    "cuda/c.cuh": HEADER + "#ifdef DISABLE_DROPOUT\n#endif\n",
    "cuda/d.cuh": HEADER + "using namespace cute;\n",
    "cuda/e.cu": SPDX + 'void f() { printf("x"); }\n',
    "cuda/f.cuh": HEADER + "\n" * MAX_FILE_LINES,
    "cuda/g.cu": SPDX + "void f() { cudaStreamSynchronize(0); }\n",
    "cuda/h.cuh": HEADER + "// x = y + 1;\n",
    "cuda/kernel_utils.cuh": HEADER,
    "ops/a.cpp": SPDX + '#include "cuda/sm80/forward.cuh"\n',
    "ops/b.cpp": SPDX + "#define FLASH_BOOL_SWITCH(x)\n",
    "ops/c.cpp": SPDX + "void f() {\n" + "  g();\n" * MAX_OPS_FUNCTION_LINES + "}\n",
    "ops/d.cpp": SPDX + "// TODO: finish\n",
    "ops/e.cpp": SPDX + "// see /home/me/notes\n",
    "ops/f.cpp": SPDX + "#define CHECK_IT(x) x\n",
    "primitives/a.cuh": HEADER + "// for attention\n",
    "primitives/b.cuh": HEADER + '#include "attention/mask.h"\n',
}


def write_tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_good_sources_pass(tmp_path):
    assert tree_violations(write_tree(tmp_path, GOOD)) == []


@pytest.mark.parametrize("name", BAD)
def test_each_bad_source_is_named(tmp_path, name):
    found = tree_violations(write_tree(tmp_path, {name: BAD[name]}))
    assert found and all(line.startswith(name + ":") for line in found)


def test_too_many_instances_are_named(tmp_path):
    files = {f"cuda/instances/d{n}.cu": SPDX for n in range(MAX_CUDA_INSTANCES + 1)}
    assert len(tree_violations(write_tree(tmp_path, files))) == 1


def test_bad_python_is_named(tmp_path):
    bad = tmp_path / "sdpa_utils.py"
    bad.write_text("import torch\n# x = torch.empty(3)\n")
    assert len(list(python_violations(bad))) == 3
