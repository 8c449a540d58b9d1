"""Time columns in turn on a GPU: CUDA graphs of many calls, events around each, ratios within a turn.

A graph holds every call of a column once or more often, each on another copy of the weight, so that no copy is in the
cache when its turn comes and the gaps between launches are those of a real model under CUDA graphs. A turn replays the
graph of every column once, in an order drawn anew; a short spin on the GPU before each turn lets the processor enqueue
all of them first. Without a GPU (dry run) the calls are made one after the other and the wall clock is read.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from typing import Any

import torch

Calls = list[Callable[[], Any]]

GRAPH_SECONDS = 400e-6  # of work in a graph, so that what its launch costs is lost in it
MAX_CALLS = 256
SPIN_CYCLES = 400_000  # about 0.2 ms


class Column:
    """Some calls of one kind, replayed together; ``capture_error`` says why they are not one CUDA graph."""

    def __init__(self, calls: Calls, device: torch.device, seconds_per_call: float):
        self.calls, self.graph, self.capture_error = calls, None, None
        self.count = len(calls)
        if device.type != "cuda":
            return
        self.count = min(MAX_CALLS, max(self.count, math.ceil(GRAPH_SECONDS / seconds_per_call)))
        warm_up(calls)
        try:
            self.graph = capture([calls[i % len(calls)] for i in range(self.count)])
        except Exception as error:
            self.capture_error = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            torch.cuda.synchronize()

    def run(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        for i in range(self.count):
            self.calls[i % len(self.calls)]()


def warm_up(calls: Calls) -> None:
    """Every call twice on another stream: kernels are compiled, algorithms chosen, scratch allocated."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in [*calls, *calls[:2]]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def capture(calls: Calls) -> torch.cuda.CUDAGraph:
    """One CUDA graph of all calls; what they return is dropped."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def seconds_of(call: Callable[[], Any]) -> float:
    """A first estimate of what one call takes on the GPU, launch included."""
    call()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SPIN_CYCLES)
    start.record()
    for _ in range(3):
        call()
    end.record()
    torch.cuda.synchronize()
    return max(1e-6, start.elapsed_time(end) / 3e3)


def take_turns(
    columns: dict[Any, Calls], device: torch.device, *, seconds: float, min_turns: int = 11, max_turns: int = 60
) -> tuple[dict[Any, list[float]], dict[Any, Column]]:
    """Seconds per call of every column in every turn, and the columns."""
    on_gpu = device.type == "cuda"
    made = {name: Column(calls, device, seconds_of(calls[0]) if on_gpu else 1.0) for name, calls in columns.items()}
    times: dict[Any, list[float]] = {name: [] for name in made}
    order, shuffled = list(made), random.Random(0)
    start = time.perf_counter()
    for turn in range(-1, max_turns):  # the first turn is dropped
        if turn >= min_turns and time.perf_counter() - start > seconds:
            break
        shuffled.shuffle(order)
        for name, took in (turn_on_gpu if on_gpu else turn_on_cpu)(made, order).items():
            if turn >= 0:
                times[name].append(took / made[name].count)
    return times, made


def turn_on_gpu(columns: dict[Any, Column], order: list) -> dict[Any, float]:
    events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in order}
    torch.cuda._sleep(SPIN_CYCLES)
    for name in order:
        events[name][0].record()
        columns[name].run()
        events[name][1].record()
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}


def turn_on_cpu(columns: dict[Any, Column], order: list) -> dict[Any, float]:
    times = {}
    for name in order:
        start = time.perf_counter()
        columns[name].run()
        times[name] = time.perf_counter() - start
    return times
