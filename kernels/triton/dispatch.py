"""For which products a GPU kernel is used: those for which it was measured to be faster, on this GPU. No other.

Every product has a way that needs no measurement: the weight (or, for gradients, dY^T X) is formed once in scratch and
the product left to cuBLAS. A kernel takes its place where the file of the GPU (``configs``) has a row that fits:

    "dispatch": {"d4": [{"pattern": "unstructured", "sparsity": 0.74, "weights": 4194304, "tokens": 8},
                        {"pattern": "unstructured", "sparsity": 0.49, "weights": 4194304, "tokens": 4}],
                 "cslt": [{"pattern": "2:4", "from": 512, "tokens": 8192, "replaces": false}]}

The first row that fits decides. ``sparsity`` and ``weights`` (m times n) are lower limits, ``tokens`` is the last
number of tokens (null: any number, 0: never), ``from`` the first (1). N:M patterns other than 2:4 have the bitmask of
an unstructured weight, are read by the same kernels and take its rows. Rows are measured in bfloat16 and hold for
float16; float32 products take the dense way. A GPU without a file has the rows of ``default.json``: 0 everywhere.

``replaces`` of cuSPARSELt: its form is the only one of the weight, 1.25 bytes a weight with the metadata, and serves
every number of tokens; false: it is a second form beside that of mma_sp, 2.25 bytes a weight in all.

Of that rule ``ALWAYS_USED`` names the exceptions: kernels without such a way beside them. No table and no word switches
them off (``SPARSE_RT_BACKEND=reference`` does).

``SPARSE_RT_GPU_KERNELS`` changes this for a process: words with commas between them, applied from left to right.

    measured     what the file of the GPU says (the default)
    PATH.json    what this file says, for example one that benchmarks/gpu_suite.py has just written
    all          and every kernel without a row of this GPU, up to the number of tokens that it was made for
    none         no kernel
    NAME, -NAME  this one (as with all), not this one
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_rt.errors import UserError
from sparse_rt.kernels.triton import configs

VARIABLE = "SPARSE_RT_GPU_KERNELS"
WORDS = "measured (default), PATH.json, all, none, NAME or -NAME of a kernel; several with commas between them"
BITMASK = "unstructured"
DTYPES = (torch.bfloat16, torch.float16)  # that a measured row holds for


class Limits(NamedTuple):
    """Numbers of tokens, both included, for which a kernel is used; ``last`` None: any number from ``first`` on."""

    first: int = 1
    last: int | None = None
    replaces: bool = False

    @property
    def never(self) -> bool:
        return self.last is not None and self.last < self.first

    def __contains__(self, tokens: object) -> bool:
        return isinstance(tokens, int) and self.first <= tokens and (self.last is None or tokens <= self.last)

    def __str__(self) -> str:
        if self.never:
            return "never"
        if self.last is None:
            return "any number of tokens" if self.first <= 1 else f"{self.first} tokens and more"
        return f"{self.first} to {self.last} tokens"


NEVER, ALWAYS = Limits(1, 0), Limits()


@dataclass(frozen=True)
class Kernel:
    """``unmeasured``: what it is made for, and used for where the user asks for it without a measurement."""

    about: str
    unmeasured: Limits
    patterns: tuple[str, ...] = ("2:4", BITMASK)


KERNELS = {
    "d4": Kernel("y from the layout d4 (served weights, few tokens)", Limits(1, 8)),
    "mma_sp": Kernel("y from the layout mma_sp (served 2:4 weights, sparse tensor cores)", Limits(1, 16), ("2:4",)),
    "cslt": Kernel("y by cuSPARSELt (served 2:4 weights, many tokens)", Limits(512), ("2:4",)),
    "linear": Kernel("y from values and metadata", Limits(1, 64)),
    "linear_t": Kernel("dX from values and metadata", Limits(1, 64)),
    "values_grad": Kernel("dY^T X at the kept positions", ALWAYS),
    "factors_grad": Kernel("gradients of SPP, reduced in the tiles of dY^T X", ALWAYS),
    "rank_products": Kernel("gradients of MaskLoRA, reduced in the tiles of dY^T X", ALWAYS),
    "positions_grad": Kernel("dY^T X at chosen positions, and where it is largest (SEFT)", ALWAYS),
    "scale_columns": Kernel("columns of an activation times a trained vector, and its gradient (DCFT)", ALWAYS),
}

# Kernel -> what it makes, and why nothing takes its place.
ALWAYS_USED = {
    "experts": "y of a mixture of experts from values and metadata; the dense ways ask the device which experts were "
    "chosen, which no CUDA graph can, or expand all of them at every step"
}

_forced: frozenset[str] | None = None


@contextmanager
def forced(*names: str) -> Iterator[None]:
    """Use these kernels for every number of tokens that they can take, and no other; for measurements and checks.

    Holds for all threads of the process, because backward passes run in one of their own.
    """
    global _forced
    unknown = set(names) - set(KERNELS)
    if unknown:
        raise UserError(f"unknown GPU kernels {sorted(unknown)}; known are {', '.join(KERNELS)}")
    before, _forced = _forced, frozenset(names)
    try:
        yield
    finally:
        _forced = before


def state() -> tuple[str, frozenset[str] | None]:
    """What ``limits`` depends on beside its arguments, as a key for who remembers an answer."""
    return os.environ.get(VARIABLE, ""), _forced


def limits(
    kernel: str, pattern: str, m: int, n: int, sparsity: float, dtype: torch.dtype, device: torch.device | None = None
) -> Limits:
    """For how many tokens ``kernel`` multiplies such a weight on ``device`` (default: the current GPU)."""
    if _forced is not None:
        return ALWAYS if kernel in _forced else NEVER
    kind = "2:4" if pattern == "2:4" else BITMASK
    place = configs.gpu_name(device), kernel, kind, m * n, round(sparsity, 4), dtype in DTYPES
    return _limits(os.environ.get(VARIABLE, ""), *place)


def takes(kernel: str, tokens: int, values: Tensor, pattern: str, m: int, n: int) -> bool:
    """Whether ``kernel`` is used for these tokens and canonical ``values`` (their device, dtype and number)."""
    sparsity = 1 - values.numel() / max(1, m * n)
    return tokens in limits(kernel, pattern, m, n, sparsity, values.dtype, values.device)


@functools.lru_cache(maxsize=4096)
def _limits(setting: str, gpu: str, kernel: str, kind: str, weights: int, sparsity: float, narrow: bool) -> Limits:
    if kind not in KERNELS[kernel].patterns:
        return NEVER
    plan = parse(setting)
    if kernel in plan.off or (plan.base == "none" and kernel not in plan.on):
        return NEVER
    found = _row(plan, gpu, kernel, kind, weights, sparsity) if narrow else None
    if kernel in plan.on or plan.base == "all":
        return KERNELS[kernel].unmeasured if found is None or found.never else found
    return found or NEVER


def _row(plan: Plan, gpu: str, kernel: str, kind: str, weights: int, sparsity: float) -> Limits | None:
    """The first row that fits, of the user's file, otherwise of the GPU's, otherwise of the default's."""
    for table in [read(plan.file)] if plan.file else [configs.read(gpu), configs.read(configs.DEFAULT)]:
        for row in table.get("dispatch", {}).get(kernel, []):
            fits = row.get("pattern", kind) == kind and weights >= row.get("weights", 0)
            if fits and sparsity >= row.get("sparsity", 0):
                return Limits(row.get("from", 1), row["tokens"], row.get("replaces", False))
    return None


@dataclass(frozen=True)
class Plan:
    """What ``SPARSE_RT_GPU_KERNELS`` asks for."""

    base: str = "measured"
    file: str | None = None
    on: frozenset[str] = frozenset()
    off: frozenset[str] = frozenset()


@functools.cache
def parse(setting: str) -> Plan:
    """The words of ``SPARSE_RT_GPU_KERNELS``; ``UserError`` for one that is unknown."""
    base, file, on, off = "measured", None, set(), set()
    for word in filter(None, (word.strip() for word in setting.split(","))):
        name = word.removeprefix("-")
        if word in ("measured", "all", "none"):
            base = word
        elif word.endswith(".json"):
            read(word)
            file = word
        elif name in KERNELS:
            (off if word != name else on).add(name)
            (on if word != name else off).discard(name)
        else:
            allowed = f"measured, all, none, a file that ends in .json, {', '.join(KERNELS)}, or one of these after '-'"
            raise UserError(f"{VARIABLE}={setting}: {word!r} is not known; allowed are {allowed}")
    return Plan(base, file, frozenset(on), frozenset(off))


@functools.cache
def read(path: str) -> dict[str, Any]:
    """A table that the user names, checked; ``UserError`` where it is none."""
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{VARIABLE}: {path} cannot be read as JSON: {error}") from error
    wrong = problems(table)
    if wrong:
        raise UserError(f"{VARIABLE}: {path} is not a dispatch table: {wrong[0]}")
    return table


def problems(table: Any) -> list[str]:
    """What is wrong with the rows of a table, in words."""
    dispatch = table.get("dispatch") if isinstance(table, dict) else None
    if not isinstance(dispatch, dict):
        return ['it has no "dispatch": {kernel: [rows]}']
    found = [f"unknown kernel {name!r}; known are {', '.join(KERNELS)}" for name in dispatch if name not in KERNELS]
    kinds = {"pattern": str, "sparsity": (int, float), "weights": int, "from": int, "replaces": bool}
    for name, rows in dispatch.items():
        for row in rows if isinstance(rows, list) else [rows]:
            if not isinstance(row, dict) or "tokens" not in row or not isinstance(row["tokens"], int | None):
                found.append(f'a row of {name} needs "tokens": a number or null, got {row!r}')
                continue
            found += [f"{name}: unknown {key!r} in {row!r}" for key in row if key not in (*kinds, "tokens")]
            found += [
                f"{name}: {key!r} of {row!r} has the wrong type"
                for key in kinds
                if key in row and not isinstance(row[key], kinds[key])
            ]
            if row.get("replaces") and (row["tokens"] is not None or row.get("from", 1) > 1):
                found.append(f"{name}: a form that replaces the others serves every number of tokens, not {row!r}")
    return found


def measured(device: torch.device | None = None) -> dict[str, Any] | None:
    """What the table in force says about its measurement (GPU, date, versions); None: this GPU was not measured."""
    plan = parse(os.environ.get(VARIABLE, ""))
    gpu = configs.gpu_name(device)
    table = read(plan.file) if plan.file else (configs.read(gpu) if gpu != configs.DEFAULT else {})
    if "dispatch" not in table:
        return None
    return {"gpu": table.get("gpu"), **table.get("measured", {})}


def refusal(kernel: str) -> str:
    """Why ``kernel`` is not used where ``takes`` says no, with the remedy."""
    setting = os.environ.get(VARIABLE, "")
    plan = parse(setting)
    if kernel in plan.off or plan.base == "none":
        return f"{VARIABLE}={setting}"
    if measured() is not None:
        return f"{kernel} was not measured to be faster than the dense product for such a weight on this GPU"
    return f"{kernel} has not been measured on this GPU ({VARIABLE}=all uses it all the same)"
