"""How much memory a worker of vLLM spends on weights, and how long it takes to load them.

Parameters do not tell: vLLM's oneDNN and zentorch paths repack a dense weight and free its Parameter, so that what they
multiply with is no tensor of the model. So the worker weighs itself around the loading, before the KV cache exists, the
same way for a dense and a compressed model. It leaves what it found in a file that an environment variable names, which
every process of an engine inherits.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_rt.benchmarking.processes import status_bytes

FILE_VARIABLE = "SPARSE_RT_BENCH_WEIGHTS"
# vLLM's option worker_cls takes a class by name.
WORKER = "sparse_rt.benchmarking.vllm_worker.WeighedWorker"


@dataclass(frozen=True)
class LoadedWeights:
    """``held`` bytes that loading added to the worker, ``tensors`` bytes of parameters and buffers, ``seconds``."""

    held: int
    tensors: int
    seconds: float


def held_bytes(device: torch.device) -> int | None:
    """Bytes allocated on an accelerator, or anonymous memory of this process; None where neither can be read.

    Mapped files do not count, nor does what was freed: the allocator gives it back before the look.
    """
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)
    return status_bytes("RssAnon")


def tensor_bytes(model: torch.nn.Module) -> int:
    """Bytes of all tensors that the modules hold: parameters, buffers, and what is derived from them at run time."""
    found: dict[int, int] = {}
    for module in model.modules():
        for value in (*module.parameters(False), *module.buffers(False), *vars(module).values()):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":  # a packed layer keeps meta tensors
                found[value.data_ptr()] = max(value.nbytes, found.get(value.data_ptr(), 0))
    return sum(found.values())


def record(found: LoadedWeights) -> None:
    """Leave ``found`` in the file that the environment names; one line a worker."""
    if path := os.environ.get(FILE_VARIABLE):
        with open(path, "a") as file:
            file.write(json.dumps(vars(found)) + "\n")


def recorded(path: Path) -> LoadedWeights | None:
    """What the workers of one engine left together: bytes added up, seconds of the slowest. None for nothing."""
    if not path.is_file():
        return None
    workers = [LoadedWeights(**json.loads(line)) for line in path.read_text().splitlines()]
    held, tensors = sum(worker.held for worker in workers), sum(worker.tensors for worker in workers)
    return LoadedWeights(held, tensors, max(worker.seconds for worker in workers))
