# SPDX-License-Identifier: BSD-3-Clause
"""What every test needs: the extension that is tested, the backends, the seed, the report.

FLASH_ATTN_TEST_SEED fixes the inputs; without it each run draws its own and prints it.
"""

import contextlib
import json
import os
import pathlib
import random
import time
from collections import Counter

import pytest

os.environ.setdefault("FLASH_ATTN_TEST_SEED", str(random.SystemRandom().randrange(10**6)))
WITHOUT_EXTENSION = {"test_layering.py"}
BACKENDS = ("cpu", "simt", "sm80", "sm90")


def pytest_addoption(parser):
    parser.addoption("--random-cases", type=int, default=24, help="random cases per backend")
    parser.addoption("--json", metavar="PATH", help="write the outcome of the run as JSON")


def pytest_configure(config):
    config.outcome = Outcome(config)
    config.pluginmanager.register(config.outcome)


def pytest_report_header():
    seed = os.environ["FLASH_ATTN_TEST_SEED"]
    try:
        import flash_attn
    except ImportError as error:
        return [f"flash_attn: {error}"]
    return [f"flash_attn._C: {flash_attn._C.__file__}; FLASH_ATTN_TEST_SEED={seed}"]


def pytest_collection_modifyitems(items):
    """A run is never green without our kernels."""
    if all(item.path.name in WITHOUT_EXTENSION for item in items):
        return
    try:
        import torch

        import flash_attn

        compiled = flash_attn._C.backends()
        torch.ops.flash_attn._fwd.default  # noqa: B018
    except (ImportError, AttributeError) as error:
        pytest.exit(f"flash_attn._C is not what would be tested: {error}", returncode=1)
    if "cpu" not in compiled:
        pytest.exit(f"flash_attn._C has no CPU backend, only {compiled}", returncode=1)


def pytest_generate_tests(metafunc):
    if "random_index" in metafunc.fixturenames:
        metafunc.parametrize("random_index", range(metafunc.config.getoption("--random-cases")))


@pytest.fixture(scope="session", autouse=True)
def _one_thread_per_worker():
    """Workers share the machine."""
    import torch

    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


class Backend:
    """One backend of the extension, and the device that its tensors live on."""

    def __init__(self, name):
        self.name = name
        self.device = "cpu" if name == "cpu" else "cuda"

    @property
    def dtypes(self):
        """Names of the dtypes that the backend is meant for."""
        from cases import DTYPES

        return DTYPES[2:] if self.name.startswith("sm") else DTYPES

    @property
    def dtype(self):
        return self.dtypes[0]

    def __repr__(self):
        return self.name

    def use(self):
        import flash_attn

        return flash_attn.use_backend(self.name)

    def attention(self, *tensors, deterministic=False, **features):
        """The operator on this backend; skips the test by the backend's own reason. A backward
        pass follows the forward, so it needs no context."""
        import torch

        ops = torch.ops.flash_attn
        given = [*tensors, *features.values()]
        backward = any(isinstance(t, torch.Tensor) and t.requires_grad for t in given)
        for direction in {False, backward}:
            reasons = ops._why_unsupported(
                *tensors, **features, backend=self.name, backward=direction
            )
            if reasons:
                pytest.skip(f"{self.name}: " + "; ".join(reasons))
        with self.use():
            return ops.attention(*tensors, **features, deterministic=deterministic)


@pytest.fixture(params=BACKENDS)
def backend(request):
    import torch

    import flash_attn

    if request.param not in flash_attn._C.backends():
        pytest.skip(f"this build has no {request.param} backend")
    if request.param != "cpu" and not torch.cuda.is_available():
        pytest.skip("no GPU is visible")
    return Backend(request.param)


@pytest.fixture
def poisoned():
    """A context in which fresh memory is NaN: what is read before it is written, or never written,
    shows. It is torch's deterministic mode, so backward is deterministic in it."""
    import torch

    @contextlib.contextmanager
    def context():
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)

    return context


def _counts():
    return {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0}


class Outcome:
    """Counts, times and failures of the run, as JSON."""

    def __init__(self, config):
        self.path = config.getoption("--json")
        self.files, self.failures, self.reasons = {}, [], Counter()
        self.started = time.time()

    def pytest_runtest_logreport(self, report):
        file = self.files.setdefault(report.location[0], _counts())
        file["seconds"] += report.duration
        if report.when == "call" or report.outcome != "passed":
            file[report.outcome] += 1
        if report.failed:
            self.failures.append({"test": report.nodeid, "text": str(report.longrepr)[-2000:]})
        elif report.skipped and isinstance(report.longrepr, tuple):
            self.reasons[report.longrepr[2]] += 1

    def pytest_sessionfinish(self, session):
        if not self.path or hasattr(session.config, "workerinput"):
            return
        import torch

        import flash_attn

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        summary = {
            "device": device,
            "torch": torch.__version__,
            "build": flash_attn.build_info(),
            "seed": os.environ["FLASH_ATTN_TEST_SEED"],
            "seconds": round(time.time() - self.started, 1),
            "totals": {
                key: round(sum(file[key] for file in self.files.values()), 1) for key in _counts()
            },
            "files": self.files,
            "failures": self.failures,
            "skipped_because": dict(self.reasons),
        }
        path = pathlib.Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(summary, indent=1, default=str) + "\n")
