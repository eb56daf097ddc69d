# SPDX-License-Identifier: BSD-3-Clause
"""Installs what is missing of pyproject.toml's optional dependencies: install_extra.py EXTRA...

Where nothing is missing, nothing is fetched and pip does not run.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def numbers(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text)]


def is_installed(requirement: str) -> bool:
    name, relation, wanted = re.fullmatch(r"([\w-]+)(?:(==|>=)(.+))?", requirement).groups()
    try:
        found = version(name)
    except PackageNotFoundError:
        return name == "ninja" and shutil.which(name) is not None
    if relation == "==":
        return found == wanted
    return relation is None or numbers(found) >= numbers(wanted)


def main() -> int:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    wanted = [item for extra in sys.argv[1:] for item in project["optional-dependencies"][extra]]
    missing = [item for item in wanted if not is_installed(item)]
    if not missing:
        return 0
    print("installing", ", ".join(missing), flush=True)
    return subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing]).returncode


if __name__ == "__main__":
    sys.exit(main())
