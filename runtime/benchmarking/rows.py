"""One figure of a benchmark: samples of both sides, taken in turn, and their ratio pair by pair."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sparse_rt.config import BenchOptions
from sparse_rt.progress import Progress

# A sample shorter than this repeats its call, so that the clock and the scheduler do not decide.
SAMPLE_SECONDS = 0.1
MAX_CALLS = 10
SIDES = ("dense", "sparse")


@dataclass(frozen=True)
class Row:
    """``what`` was measured in ``unit`` ("s" or "bytes", so lower is always better).

    ``dense[i]`` and ``sparse[i]`` are one pair, measured one after the other; ``tokens`` is how many tokens one such
    time covers (None where that means nothing). Rows of a sweep have a ``request_rate`` (requests a second, inf for all
    at once) and the ``metric`` that they hold there.
    """

    engine: str
    phase: str
    what: str
    unit: str
    dense: list[float]
    sparse: list[float]
    batch: int | None = None
    tokens: int | None = None
    note: str | None = None
    request_rate: float | None = None
    metric: str | None = None
    models: tuple[str, str] = SIDES

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON: median, min, max and samples of both sides and of dense / sparse (above 1 sparse wins)."""
        ratios = [dense / sparse for dense, sparse in zip(self.dense, self.sparse, strict=True)]
        sides = {"dense": summary(self.dense), "sparse": summary(self.sparse)}
        models = dict(zip(SIDES, self.models, strict=True))
        speeds = None
        if self.tokens is not None:
            speeds = {side: self.tokens / sides[side]["median"] for side in SIDES}
        return {
            "engine": self.engine,
            "phase": self.phase,
            "what": ", ".join(part for part in (self.what, comparison(models)) if part),
            "batch": self.batch,
            "unit": self.unit,
            **sides,
            "ratio": summary(ratios),
            "tokens_per_second": speeds,
            "note": self.note,
            "request_rate": None if self.request_rate is None else json_rate(self.request_rate),
            "metric": self.metric,
            "models": models,
        }


def comparison(models: dict[str, str]) -> str:
    """Which models a row compares, in words; "" for the dense one with the sparse one."""
    dense, sparse = SIDES
    ours = models[sparse] if models[sparse] != sparse else ""
    against = f"against {models[dense]}" if models[dense] != dense else ""
    return " ".join(part for part in (ours, against) if part)


def json_rate(rate: float) -> float | str:
    """A request rate for JSON, which has no infinite numbers."""
    return "inf" if math.isinf(rate) else rate


def summary(samples: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples), "samples": list(samples)}


def in_turn(
    dense: Callable[[], Any], sparse: Callable[[], Any], repeats: int, progress: Progress, description: str
) -> tuple[list[Any], list[Any]]:
    """Call dense, sparse, dense, sparse ... ``repeats`` times; what each returned, pair by pair."""
    found = all_in_turn({"dense": dense, "sparse": sparse}, repeats, progress, description)
    return found["dense"], found["sparse"]


def all_in_turn(
    calls: dict[str, Callable[[], Any]], repeats: int, progress: Progress, description: str
) -> dict[str, list[Any]]:
    """The same for any number of models: call them one after the other, ``repeats`` times; what each returned."""
    turns = [
        {name: call() for name, call in calls.items()}
        for _ in progress.track(range(repeats), description, total=repeats)
    ]
    return {name: [turn[name] for turn in turns] for name in calls}


def timed(call: Callable[[], Any], device: torch.device | str = "cpu") -> tuple[float, Any]:
    """(seconds, result) of one call, including the work it left queued on an accelerator."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - start, result


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def calls_for(seconds: float) -> int:
    """How often a call of ``seconds`` is repeated in one sample."""
    return max(1, min(MAX_CALLS, round(SAMPLE_SECONDS / max(seconds, 1e-6))))


def generation_rows(
    engine: str,
    dense: list,
    sparse: list,
    batch: int,
    options: BenchOptions,
    note: str | None,
    models: tuple[str, str] = SIDES,
) -> list[Row]:
    """The rows of (prefill seconds, seconds a decode step) pairs; no decode row where no step was taken."""
    prompt = f"prompt of {options.prompt_tokens} tokens"
    shared = {"batch": batch, "note": note, "models": models}
    tokens = batch * options.prompt_tokens
    rows = [Row(engine, "prefill", prompt, "s", *_part(dense, sparse, 0), tokens=tokens, **shared)]
    if dense[0][1]:
        what = f"one step after {options.prompt_tokens} tokens"
        rows.append(Row(engine, "decode", what, "s", *_part(dense, sparse, 1), tokens=batch, **shared))
    return rows


def _part(dense: list, sparse: list, index: int) -> tuple[list[float], list[float]]:
    return [sample[index] for sample in dense], [sample[index] for sample in sparse]


def calls_note(calls: int) -> str | None:
    """How a sample came about, for the row's note."""
    return f"each sample is the median of {calls} calls" if calls > 1 else None
