"""Which calls the Triton backend takes, and what it says where it does not run."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from sparse_rt.kernels import backends
from sparse_rt.kernels.backends import Call
from sparse_rt.kernels.triton import ops

OPS = ("linear", "linear_t", "values_grad", "decompress", "gather", "experts")


@pytest.fixture(autouse=True)
def _fresh_answers():
    ops.unavailable_reason.cache_clear()
    yield
    ops.unavailable_reason.cache_clear()


def refusal(op="linear", pattern="2:4", dtype=torch.bfloat16, device="cuda"):
    choice = backends.explain(Call(op, pattern, 64, 64, 1, dtype, device))
    return dict(choice.refused).get("triton")


@pytest.mark.parametrize("op", OPS)
def test_every_operation_is_there_and_says_that_the_tensors_are_on_the_cpu(op, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert refusal(op, device="cpu") == "the Triton kernels run on CUDA devices, the tensors are on cpu"


def test_refusals_name_what_is_missing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "not float64" in refusal(dtype=torch.float64)
    if not torch.cuda.is_available():
        reason = refusal()
        assert reason == ("there is no CUDA device" if importlib.util.find_spec("triton") else ops.NOT_INSTALLED)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    ops.unavailable_reason.cache_clear()
    assert refusal() == ops.NOT_INSTALLED


def test_choosing_a_backend_on_the_cpu_does_not_import_triton():
    code = """
import sys, torch
from sparse_rt.kernels import backends
choice = backends.explain(backends.Call("linear", "2:4", 64, 64, 1, torch.float32, "cpu"))
print(choice.backend.name != "triton", "triton" in sys.modules, "sparse_rt.kernels.triton.linear" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert done.stdout.split() == ["True", "False", "False"], done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("pattern", ("2:4", "4:8", "unstructured"))
def test_tensors_on_a_gpu_go_to_triton(op, pattern):
    choice = backends.explain(Call(op, pattern, 64, 64, 1, torch.bfloat16, "cuda"))
    assert choice.backend.name == "triton"
