"""Which implementation runs an operation: every backend answers yes or a reason, the best yes wins.

The order is the priority; ``SPARSE_RT_BACKEND=NAME`` forces one backend; when none fits the error lists every refusal.
Outside packages register theirs through entry points of the group ``sparse_rt.backends``.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points

import torch

from sparse_rt.errors import BackendError, UserError

logger = logging.getLogger(__name__)

OPS = ("linear", "packed_linear", "linear_t", "values_grad", "decompress", "gather", "experts", "packed_experts")
FORCE_VARIABLE = "SPARSE_RT_BACKEND"

# Where the backends of the project are registered. Importing them compiles nothing and needs no Triton.
MODULES = (
    "sparse_rt.kernels.reference",
    "sparse_rt.kernels.native.ops",
    "sparse_rt.kernels.native.packed",
    "sparse_rt.kernels.native.experts",
    "sparse_rt.kernels.triton.ops",
    "sparse_rt.kernels.triton.packed",
)


@dataclass(frozen=True)
class Call:
    """One operation as a backend sees it; ``tokens`` is the product of the leading dimensions (0 without tokens)."""

    op: str
    pattern: str
    m: int
    n: int
    tokens: int
    dtype: torch.dtype
    device: str


@dataclass(frozen=True)
class Backend:
    op: str
    name: str
    patterns: tuple[str, ...] | None
    priority: int
    can_run: Callable[[Call], str | None]
    function: Callable

    def refusal(self, call: Call) -> str | None:
        """None when this backend can run ``call``, otherwise the reason."""
        if (
            self.patterns is not None
            and call.pattern not in self.patterns
            and _family(call.pattern) not in self.patterns
        ):
            return f"only the patterns {', '.join(self.patterns)}"
        return self.can_run(call)


@dataclass(frozen=True)
class Choice:
    """The outcome for one call: the backend that runs it and why the others do not."""

    backend: Backend | None
    refused: tuple[tuple[str, str], ...]


_BACKENDS: dict[tuple[str, str], Backend] = {}
_announced: set[tuple[str, str, str]] = set()


def _family(pattern: str) -> str:
    return "N:M" if ":" in pattern and pattern != "2:4" else pattern


def register_backend(
    op: str,
    *,
    name: str,
    patterns: tuple[str, ...] | None = None,
    priority: int = 10,
    can_run: Callable[[Call], str | None] = lambda call: None,
) -> Callable[[Callable], Callable]:
    """Decorator: ``function`` (signature of the op) becomes backend ``name`` of ``op``; ``patterns`` None means all."""
    if op not in OPS:
        raise UserError(f"backend {name!r}: unknown op {op!r}; known are {', '.join(OPS)}")

    def add(function: Callable) -> Callable:
        known = _BACKENDS.get((op, name))
        if known is not None and _owner(known.function) != _owner(function):
            raise UserError(f"backend {name!r} of {op} is defined by {_owner(known.function)} and {_owner(function)}")
        _BACKENDS[op, name] = Backend(op, name, patterns, priority, can_run, function)
        select.cache_clear()
        return function

    return add


def _owner(function: Callable) -> str:
    return f"{function.__module__}.{function.__qualname__}"


@functools.cache
def load_backends() -> None:
    """Import the backends of the project and of entry points (once)."""
    for module in MODULES:
        importlib.import_module(module)
    for entry in entry_points(group="sparse_rt.backends"):
        entry.load()


def backend_names() -> list[str]:
    load_backends()
    return sorted({name for _, name in _BACKENDS})


def explain(call: Call, forced: str | None = None) -> Choice:
    """Ask every backend of ``call.op`` in order of priority."""
    load_backends()
    if forced and forced not in backend_names():
        raise UserError(f"{FORCE_VARIABLE}={forced}: unknown backend; known are {', '.join(backend_names())}")
    winner, refused = None, []
    candidates = [backend for (op, _), backend in _BACKENDS.items() if op == call.op]
    for backend in sorted(candidates, key=lambda b: -b.priority):
        if forced and backend.name != forced:
            refused.append((backend.name, f"{FORCE_VARIABLE}={forced}"))
            continue
        reason = backend.refusal(call)
        if reason is None and winner is None:
            winner = backend
        else:
            refused.append((backend.name, reason or f"{winner.name} is preferred"))
    return Choice(winner, tuple(refused))


def select(call: Call) -> Callable:
    """The function that runs ``call``; ``BackendError`` with every refusal when there is none."""
    return _select(call, os.environ.get(FORCE_VARIABLE) or None)


@functools.lru_cache(maxsize=4096)
def _select(call: Call, forced: str | None) -> Callable:
    choice = explain(call, forced)
    if choice.backend is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.refused) or "none is registered"
        raise BackendError(f"no backend can run {call.op} for {call}: {reasons}")
    key = (call.op, call.pattern, choice.backend.name)
    if key not in _announced:
        _announced.add(key)
        logger.info("%s of %s weights runs on the %s backend", *key)
    return choice.backend.function


select.cache_clear = _select.cache_clear  # type: ignore[attr-defined]
