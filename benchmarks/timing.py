"""Time several columns in turn on a machine that others use too, and reduce the times without fooling anybody.

Every column is called once a turn, in an order drawn anew for each turn, so that none of them always follows the same
predecessor; a slow spell then hits all columns of that turn. A ratio is the median over turns of the ratio *within* a
turn: drifts of the memory bandwidth (neighbours on the same host) move both sides of it and cancel. The ratio of the
two medians stands beside it as a check.

Wall time is the clock: it is what a user waits, and with several threads there is no other honest one. On one thread
the processor time of the thread is taken as well. The two differ when this process lost its core to another one, so a
turn whose wall time exceeds its processor time is counted as preempted, and where that happened in more than a fifth
of the turns (too many for a median to be safe) the processor time is reported instead and the row says so. Processor
time is never preferred otherwise: it hides waiting that is the column's own fault. Neither clock sees what another
process takes of memory bandwidth and cache; busy and stolen cores are recorded, and p10 to p90 shows the rest.
"""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparse_rt.benchmarking.machine import Neighbours

# A turn counts as preempted from this much more wall than processor time: a tick of the scheduler, not a clock error.
PREEMPTED_RATIO, PREEMPTED_SECONDS = 1.05, 20e-6
PREEMPTED_SHARE = 0.2


@dataclass
class Samples:
    """Seconds of every column in every turn; ``cpu`` is empty when several threads worked."""

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]] = field(default_factory=dict)
    busy_cores: float | None = None
    stolen_cores: float | None = None

    @property
    def turns(self) -> int:
        return len(next(iter(self.wall.values())))

    def preempted(self, *columns: str) -> float | None:
        """Share of the turns in which one of ``columns`` lost its core; None where the processor time is unknown."""
        if not self.cpu:
            return None
        wall, cpu = (np.array([times[name] for name in columns]) for times in (self.wall, self.cpu))
        lost = wall > cpu * PREEMPTED_RATIO + PREEMPTED_SECONDS
        return float(lost.any(axis=0).mean())

    def clock(self, *columns: str) -> str:
        """ "wall", or "cpu" where ``columns`` lost their core too often for the median of wall time to be safe."""
        return "cpu" if (self.preempted(*columns) or 0.0) > PREEMPTED_SHARE else "wall"


def take_turns(
    columns: dict[str, Callable[[int], Any]],
    *,
    seconds: float,
    min_turns: int,
    max_turns: int,
    one_thread: bool,
    seed: int = 0,
) -> Samples:
    """Call ``column(turn)`` of every column once a turn for about ``seconds``, after a warm-up turn that is dropped."""
    order, shuffled = list(columns), random.Random(seed)
    samples = Samples({name: [] for name in columns}, {name: [] for name in columns} if one_thread else {})
    for call in columns.values():
        call(0)
    neighbours, stolen, start = Neighbours(), _stolen_seconds(), time.perf_counter()
    collected = gc.isenabled()
    gc.disable()
    try:
        turn = 0
        while turn < min_turns or (turn < max_turns and time.perf_counter() - start < seconds):
            turn += 1
            shuffled.shuffle(order)
            for name in order:
                call = columns[name]
                cpu, wall = time.thread_time(), time.perf_counter()
                call(turn)
                wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
                samples.wall[name].append(wall)
                if one_thread:
                    samples.cpu[name].append(cpu)
    finally:
        if collected:
            gc.enable()
    samples.busy_cores = neighbours.busy_cores()
    if stolen is not None:
        samples.stolen_cores = (_stolen_seconds() - stolen) / (time.perf_counter() - start)
    return samples


def spread(samples: list[float], scale: float = 1.0) -> dict[str, float]:
    """p10, median and p90 of ``samples`` times ``scale``."""
    low, middle, high = np.percentile(samples, (10, 50, 90)) * scale
    return {"p10": _digits(low), "median": _digits(middle), "p90": _digits(high)}


def ratio(baseline: list[float], measured: list[float]) -> dict[str, float]:
    """baseline / measured (above 1 ``measured`` wins): ``spread`` of the ratio of every turn, and of the medians."""
    paired = np.array(baseline) / np.array(measured)
    return {**spread(list(paired)), "of_medians": _digits(np.median(baseline) / np.median(measured))}


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _stolen_seconds() -> float | None:
    """Processor seconds that the host of a virtual machine gave to others while this machine wanted to run."""
    try:
        with open("/proc/stat") as file:
            return int(file.readline().split()[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return None
