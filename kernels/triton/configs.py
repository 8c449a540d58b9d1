"""Launch configurations of the Triton kernels, and what the compile test must know of a kernel.

A configuration is looked up, never tuned at run time: the first call of a product must not cost seconds. A JSON file
per GPU (``configs/nvidia_h200.json`` for "NVIDIA H200") holds what was measured with benchmarks/gpu_suite.py (launch
options: gpu_tune.py), and ``default.json`` what holds for any other; what neither names is the default beside the
kernel:

    {"gpu": "NVIDIA H200",
     "kernels": {"linear": [{"tokens": 16, "options": {"BN": 32, "num_warps": 4, "num_stages": 3}},
                            {"options": {"BN": 64, "num_warps": 8, "num_stages": 3}}]},
     "dispatch": {"linear": [{"pattern": "2:4", "sparsity": 0.49, "tokens": 4}]},
     "measured": {"date": "2026-12-01", "torch": "2.11.0", "triton": "3.6.0"}}

The rows of a kernel are tried in order. ``tokens``, ``m`` and ``n`` are upper limits; a row without them fits every
call, and the last row of a kernel is such a row. A kernel that a GPU's file does not name is taken from the default.
``dispatch`` says for which products a kernel is used at all (``dispatch.py``), ``measured`` with what it was measured.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import torch

DEFAULT = "default"
LIMITS = ("tokens", "m", "n")
LAUNCH = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Spec:
    """One kernel with one configuration, as tests/kernels/triton/compile_all.py compiles it for every architecture.

    signature: argument -> "*bf16", "*i32", "i32", "fp32", ... of the arguments that are not constexpr, in any order.
    constexprs: argument -> value.
    weights_per_iteration: *dense* weights (kept or not) that one program treats in one pass of its main loop; thread-
        instructions per weight are counted with it. 0: this kernel has no loop worth counting.
    expects: instructions that must appear in the machine code, as prefixes of SASS opcodes: "HMMA.SP". "HMMA|HGMMA"
        asks for one of the two, "90:HGMMA" asks on sm_90 only.
    gluon: compiled from Gluon, not from Triton.
    config: the name in the JSON files when ``constexprs``, ``num_warps`` and ``num_stages`` hold a shipped
        configuration (``shipped``); the test asserts that every shipped one is in some Spec.
    divisible: arguments whose value (a pointer: its address) is a multiple of 16 at launch, as Triton specialises
        them; None means every pointer.
    architectures: where it is compiled; () means all of the test's.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    weights_per_iteration: int = 0
    expects: tuple[str, ...] = ()
    gluon: bool = False
    config: str = ""
    divisible: tuple[str, ...] | None = None
    architectures: tuple[int, ...] = ()


def config(kernel: str, m: int, n: int, tokens: int, device: torch.device | None = None, **defaults: Any) -> dict:
    """Options of ``kernel`` (block sizes, num_warps, num_stages) for y [tokens, m] = x [tokens, n] W^T on ``device``.

    ``defaults`` are the options that the files do not give. A new dictionary every time.
    """
    return {**defaults, **(_tried.get(kernel) or _options(gpu_name(device), kernel, m, n, tokens))}


_tried: dict[str, dict[str, Any]] = {}


@contextmanager
def tried(kernel: str, options: dict[str, Any]) -> Iterator[None]:
    """``kernel`` is launched with ``options`` whatever the files say: for timing them (benchmarks/gpu_tune.py)."""
    before = _tried.get(kernel)
    _tried[kernel] = options
    try:
        yield
    finally:
        if before is None:
            del _tried[kernel]
        else:
            _tried[kernel] = before


def shipped(kernel: str) -> list[dict[str, Any]]:
    """Every different set of options that some file gives ``kernel``: what ``compile_specs`` of its module covers."""
    found: list[dict[str, Any]] = []
    for name in files():
        for row in read(name).get("kernels", {}).get(kernel, []):
            if row["options"] not in found:
                found.append(row["options"])
    return [dict(options) for options in found]


def constexprs(options: dict[str, Any]) -> dict[str, Any]:
    """The options that are arguments of the kernel: all but num_warps and num_stages."""
    return {name: value for name, value in options.items() if name not in LAUNCH}


def files() -> list[str]:
    """Names of the shipped files without ".json", the default first."""
    names = [entry.name.removesuffix(".json") for entry in _folder().iterdir() if entry.name.endswith(".json")]
    return sorted(names, key=lambda name: (name != DEFAULT, name))


@functools.cache
def read(name: str) -> dict[str, Any]:
    """The content of one file; {} where there is none."""
    file = _folder() / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def file_name(gpu: str) -> str:
    """The file of a GPU: "NVIDIA H200" -> "nvidia_h200"."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_")


def gpu_name(device: torch.device | None = None) -> str:
    """``file_name`` of ``device`` (default: the current one); the default's where there is no GPU."""
    if device is None:
        return _gpu_name(torch.cuda.current_device()) if torch.cuda.is_available() else DEFAULT
    if device.type != "cuda":
        return DEFAULT
    return _gpu_name(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter's CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _gpu_name(index: int) -> str:
    return file_name(torch.cuda.get_device_name(index))


@functools.lru_cache(maxsize=4096)
def _options(gpu: str, kernel: str, m: int, n: int, tokens: int) -> dict[str, Any]:
    call = {"tokens": tokens, "m": m, "n": n}
    for table in _tables(gpu):
        for row in table.get("kernels", {}).get(kernel, []):
            if all(call[limit] <= row[limit] for limit in LIMITS if limit in row):
                return row["options"]
    return {}


def _tables(gpu: str) -> Iterator[dict[str, Any]]:
    yield read(gpu)
    if gpu != DEFAULT:
        yield read(DEFAULT)


def _folder():
    return resources.files(__package__) / "configs"
