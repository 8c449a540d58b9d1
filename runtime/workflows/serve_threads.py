"""Which cores the workers of a vLLM server on a CPU compute on.

Left alone, vLLM ("auto") keeps one core of every worker free for its scheduler, which is half of a machine with two
cores, and refuses more workers than there are memory nodes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

BIND_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"
# By any of these the user has chosen cores; the second and third need vLLM's own choice to be in force.
CHOOSING = (BIND_VARIABLE, "VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_SIM_MULTI_NUMA", "CPU_VISIBLE_MEMORY_NODES")
SYSTEM = Path("/sys/devices/system/cpu")


def bind_threads(ranks: int, placed_by_user: str | None, environment: Mapping[str, str]) -> tuple[str | None, str]:
    """(value of ``BIND_VARIABLE`` or None to leave vLLM alone, what to say about it or "")."""
    if any(name in environment for name in CHOOSING) or not hasattr(os, "sched_getaffinity"):
        return None, ""
    if placed_by_user:
        return None, f"{placed_by_user} is given, so vLLM places its threads; {BIND_VARIABLE} says which cores compute"
    nodes = allowed_cores()
    cores = sum(len(node) for node in nodes)
    if ranks > cores:
        return None, f"{ranks} workers share {cores} cores, so vLLM places its threads; a worker less a core is faster"
    lists = share(nodes, ranks)
    used = sum(len(cores) for cores in lists)
    value = "|".join(ranges(cores) for cores in lists)
    note = f"{BIND_VARIABLE}={value}: {_count(used, 'core')} compute; set the variable for another choice"
    if used < cores:
        note += f" (a worker keeps to one memory node: --tensor-parallel-size {len(nodes)} would use all {cores})"
    return value, note


def allowed_cores(system: Path = SYSTEM) -> list[list[int]]:
    """One logical CPU of every physical core that this process may use, by memory node.

    Of the siblings of a core the last one, as vLLM does: hyperthreads share the units that compute.
    """
    nodes: dict[str, dict[str, int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        folder = system / f"cpu{cpu}"
        node = next((path.name for path in sorted(folder.glob("node[0-9]*"))), "node0")
        try:
            core = (folder / "topology" / "thread_siblings_list").read_text().strip()
        except OSError:  # no topology in this kernel or container: every CPU is a core
            core = str(cpu)
        nodes.setdefault(node, {})[core] = cpu
    return [sorted(nodes[node].values()) for node in sorted(nodes, key=lambda name: int(name.removeprefix("node")))]


def share(nodes: list[list[int]], ranks: int) -> list[list[int]]:
    """Cores of every rank: disjoint, not empty, of one memory node each wherever the nodes have enough cores.

    ``ranks`` is at most the number of cores. With fewer ranks than nodes the last nodes stay unused.
    """
    if ranks <= len(nodes):
        return nodes[:ranks]
    homes = [rank * len(nodes) // ranks for rank in range(ranks)]
    guests = [homes.count(node) for node in range(len(nodes))]
    if any(len(cores) < count for cores, count in zip(nodes, guests, strict=True)):
        return _split([cpu for cores in nodes for cpu in cores], ranks)
    return [part for cores, count in zip(nodes, guests, strict=True) for part in _split(cores, count)]


def _split(cores: list[int], parts: int) -> list[list[int]]:
    """Neighbouring parts whose sizes differ by one at most."""
    ends = [len(cores) * part // parts for part in range(parts + 1)]
    return [cores[begin:end] for begin, end in pairwise(ends)]


def ranges(cores: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for cpu in cores:
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
