"""The rule for tests of Triton kernels.

Triton decides between compiler and interpreter when it is imported, for the whole process; other tests must not see
that choice. So, without a GPU, every test file of this folder runs in a process of its own with TRITON_INTERPRET=1 and
appears here as one test named ``interpreter``; its output is shown where it fails. With a GPU the same files run as
they are, on the GPU. Files in ``OUTSIDE`` always run as they are and start the processes that they need themselves.

    pytest tests/kernels/triton                                              what CI does
    TRITON_INTERPRET=1 pytest tests/kernels/triton/test_linear.py -k bias    one test, with a debugger if need be

Tests put their tensors on ``device`` (fixture): "cpu" in the interpreter, "cuda" on a GPU. Kernels are used here
whether or not they were measured on this GPU; what is used without that is the subject of test_dispatch.py.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

OUTSIDE = ("test_compile.py", "test_backend.py")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TIMEOUT = 300  # seconds a file; they take a few


class InterpretedFile(pytest.File):
    """Collected in place of the test file: one item that runs it."""

    def collect(self):
        yield InterpretedRun.from_parent(self, name="interpreter")


class InterpretedRun(pytest.Item):
    def runtest(self):
        if importlib.util.find_spec("triton") is None:
            pytest.skip("triton is not installed")
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(self.path)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            cwd=self.config.rootpath,
            timeout=TIMEOUT,
        )
        if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
            pytest.skip("no test in this file runs in the interpreter")
        if done.returncode != 0:
            raise InterpretedFailure(done.stdout + done.stderr)

    def repr_failure(self, excinfo):
        if isinstance(excinfo.value, InterpretedFailure):
            return str(excinfo.value)
        return super().repr_failure(excinfo)

    def reportinfo(self):
        return self.path, None, f"{self.path.name} in the interpreter"


class InterpretedFailure(Exception):
    """A test failed in the other process; the text is what pytest said there."""


def pytest_pycollect_makemodule(module_path: Path, parent):
    if INTERPRETED or module_path.name in OUTSIDE or torch.cuda.is_available():
        return None
    return InterpretedFile.from_parent(parent, path=module_path)


@pytest.fixture(autouse=True)
def _every_kernel(monkeypatch):
    # cuSPARSELt would make it another layout; it has tests of its own.
    monkeypatch.setenv("SPARSE_RT_GPU_KERNELS", "all,-cslt")


@pytest.fixture
def device() -> str:
    pytest.importorskip("triton")
    return "cpu" if INTERPRETED else "cuda"
