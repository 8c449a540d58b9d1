"""Fixtures of the ONNX tests."""

from pathlib import Path

import pytest

from sparse_rt.exporters.onnx import library
from sparse_rt.kernels.native.library import ISA_VARIABLE


@pytest.fixture
def use_isa(monkeypatch):
    """Choose an instruction set; skipped where the system says that the processor lacks it, and only there."""
    chosen = []

    def choose(name):
        flag = {"scalar": "", "avx2": "avx2", "avx512": "avx512_vbmi2"}[name]
        if flag not in Path("/proc/cpuinfo").read_text():
            pytest.skip(f"this processor has no {flag}")
        monkeypatch.setenv(ISA_VARIABLE, name)  # every new session reads it
        library.use_isa(name)
        chosen.append(name)

    yield choose
    found = library.isa()
    library.use_isa("")
    assert not chosen or found == chosen[-1], f"the test ran on {found}"
